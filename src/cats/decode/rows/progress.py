"""The tokens of one session on their way from the scheduler to the threads that read them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from cats.decode.rows.logprobs import TokenLogprobs


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
        logprobs: Of each token, where they are recorded.
        reads: Counts of what was read: the number of the new token that a counted step chose, and
            the share of the dense model's weights that this step read.
    """

    def __init__(self, on_change: Callable[[], object] | None = None) -> None:
        """
        Args:
            on_change: Called after each token and at the end, by the thread that writes, so it must
                be fast. If it raises, the session ends with this error.
        """
        self.tokens: list[int] = []
        self.reason: str | None = None
        self.error: BaseException | None = None
        self.cancelled = False
        self.reused = 0
        self.logprobs: list[TokenLogprobs] = []
        self.reads: list[tuple[int, float]] = []
        self._on_change = on_change
        self._changed = threading.Condition()

    def add(self, token: int, logprobs: TokenLogprobs | None = None) -> None:
        """Take the next token."""
        with self._changed:
            if logprobs is not None:
                self.logprobs.append(logprobs)
            self.tokens.append(token)
            self._changed.notify_all()
        self._tell()

    def end(self, reason: str, error: BaseException | None = None) -> None:
        """No token follows. The first error counts."""
        with self._changed:
            self.error = self.error or error
            self.reason = reason if self.error is None else "error"
            self._changed.notify_all()
        self._tell()

    def blame(self, error: BaseException) -> None:
        """End the session with an error of a thread that reads it."""
        with self._changed:
            self.error = self.error or error
            if self.reason is not None:
                self.reason = "error"
        self.cancelled = True

    def _tell(self) -> None:
        if self._on_change is None:
            return
        try:
            self._on_change()
        except Exception as error:  # such as that of an event loop which was closed
            self._on_change = None
            self.blame(error)

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
