"""The thread that runs the sessions of one model: its start and its end."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from weakref import WeakKeyDictionary

from cats.decode.rows.inbox import Inbox

_INBOXES: WeakKeyDictionary[threading.Thread, Inbox] = WeakKeyDictionary()


def start(run: Callable[[], None], inbox: Inbox) -> threading.Thread:
    """Start a thread that runs until its inbox is closed, at the latest when Python ends."""
    thread = threading.Thread(target=run, name="cats sessions", daemon=True)
    _INBOXES[thread] = inbox
    thread.start()
    return thread


def join(thread: threading.Thread) -> None:
    """Wait until it has ended; within the thread itself, do nothing."""
    if thread is not threading.current_thread():
        thread.join()


@atexit.register
def _end_all() -> None:
    # torch must not run while Python ends
    threads = dict(_INBOXES)
    for inbox in threads.values():
        inbox.close()
    for thread in threads:
        join(thread)
