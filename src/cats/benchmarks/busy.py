"""Processes that keep processors busy while something is timed, and end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cats.errors import ConfigError

# It asks for its parent now and then: where the parent is killed, nothing else ends it.
_PROGRAM = """
import os
parent = int({parent!r})
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""
# What ends a process without running its `finally` blocks, unless it has a handler.
_ENDING = ("SIGTERM", "SIGHUP")


@contextmanager
def busy_processes(count: int) -> Iterator[list[int]]:
    """Run processes that only compute; yields their ids.

    They are gone when the block ends: also by an exception, Ctrl+C, SIGTERM or SIGHUP. Where this
    process is killed at once, each of them ends within a second.

    Args:
        count: How many; 0 starts none.

    Raises:
        ConfigError: If the number is negative.
    """
    if count < 0:
        raise ConfigError(f"the load must be 0 or more processes, got {count}")
    program = _PROGRAM.format(parent=os.getpid())
    processes: list[subprocess.Popen[bytes]] = []
    # a handler is set in the main thread only
    with _signals_raise(_ENDING):
        try:
            for _ in range(count):
                command = [sys.executable, "-I", "-S", "-c", program]
                processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
            yield [process.pid for process in processes]
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()


@contextmanager
def _signals_raise(names: tuple[str, ...]) -> Iterator[None]:
    """Within the block, these signals raise SystemExit instead of ending the process at once."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before: dict[int, signal.Handlers] = {}
    try:
        for name in names:
            number = getattr(signal, name, None)
            # a handler of the caller's own decides by itself
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.SIG_DFL
                signal.signal(number, end)
    except ValueError:
        # another thread than the main one may not set handlers
        before.clear()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
