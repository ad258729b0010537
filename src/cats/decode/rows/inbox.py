"""Sessions on their way to the thread that runs them."""

from __future__ import annotations

import os
import threading
from queue import Empty, SimpleQueue

from cats.decode.rows.row import Ticket
from cats.errors import BackendError, ConfigError


class Inbox:
    """Any thread puts sessions in, and one takes them out, in order."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Ticket | None] = SimpleQueue()
        # a garbage collection within one of these methods may call close()
        self._lock = threading.RLock()
        self._closed = False
        self._failure: BaseException | None = None
        self._process = os.getpid()

    def put(self, ticket: Ticket) -> None:
        """
        Raises:
            ConfigError: If nothing is taken in any more.
            BackendError: If this is so because of an error, or in a forked process.
        """
        if self._process != os.getpid():
            raise BackendError(
                "the thread that runs these sessions is in the process that made them, and this "
                "one was forked from it: make new ones with cats.Sessions"
            )
        with self._lock:
            if self._failure is not None:
                raise BackendError(
                    "the thread that runs sessions has ended with an error: make new ones with "
                    "cats.Sessions"
                ) from self._failure
            if self._closed:
                raise ConfigError("these sessions are closed: make new ones with cats.Sessions")
            self._queue.put(ticket)

    def close(self) -> None:
        """Take in nothing more; :meth:`take` ends."""
        # locks of a forked process may be held by threads that it does not have
        if self._process != os.getpid():
            return
        with self._lock:
            self._closed = True
            self._queue.put(None)

    def take(self, *, block: bool) -> list[Ticket] | None:
        """What has come since the last call; None once the inbox is closed.

        Args:
            block: Whether to wait until something has come.
        """
        tickets: list[Ticket] = []
        try:
            while (ticket := self._queue.get(block=block)) is not None:
                tickets.append(ticket)
                block = False
        except Empty:
            return tickets
        for ticket in tickets:
            ticket.progress.end("cancelled")
        return None

    def end(self, failure: BaseException | None = None) -> None:
        """End what nobody will take out."""
        with self._lock:
            self._closed, self._failure = True, failure
            while not self._queue.empty():
                if (ticket := self._queue.get()) is not None:
                    ticket.progress.end("cancelled", failure)
