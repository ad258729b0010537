"""The tokens of one session on their way from the scheduler to the threads that read them."""

from __future__ import annotations

import threading
from collections.abc import Iterator


class Progress:
    """What one thread writes, and any number of threads read.

    Attributes:
        tokens: The tokens so far.
        reason: Why the session ended: ``"stop"``, ``"length"``, ``"cancelled"`` or ``"error"``.
            None before.
        error: What was raised in the session.
        cancelled: Whether the session is to end. Setting it takes no lock, so that it can be set
            wherever Python drops the last reference to a session.
        reused: Tokens of the prompt that were not computed, since the cache held them.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.reason: str | None = None
        self.error: BaseException | None = None
        self.cancelled = False
        self.reused = 0
        self._changed = threading.Condition()

    def add(self, token: int) -> None:
        """Take the next token."""
        with self._changed:
            self.tokens.append(token)
            self._changed.notify_all()

    def end(self, reason: str, error: BaseException | None = None) -> None:
        """No token follows. The first error counts."""
        with self._changed:
            self.error = self.error or error
            self.reason = reason if self.error is None else "error"
            self._changed.notify_all()

    def blame(self, error: BaseException) -> None:
        """End the session with an error of a thread that reads it."""
        with self._changed:
            self.error = self.error or error
            if self.reason is not None:
                self.reason = "error"
        self.cancelled = True

    def wait(self, timeout: float | None = None) -> bool:
        """Whether the session has ended after at most ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self.reason is not None, timeout)

    def read(self) -> Iterator[int]:
        """All tokens from the first, as they come."""
        count = 0
        while True:
            with self._changed:
                while len(self.tokens) == count and self.reason is None:
                    self._changed.wait()
                new = self.tokens[count:]
            if not new:
                return
            yield from new
            count += len(new)
