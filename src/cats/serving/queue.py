"""Who may be answered now, who waits, and who is sent away."""

from __future__ import annotations

import math
from collections import deque

from cats.serving.errors import ApiError, refused

_LONGEST_RETRY = 60
# How many of the last answers tell how long the next will take.
_REMEMBERED = 32


class Queue:
    """Counts the answers that decode or wait; the event loop's thread uses it.

    Attributes:
        rows: How many decode together.
        limit: How many may wait beside them.
        open: How many do either now.
    """

    def __init__(self, *, rows: int, limit: int) -> None:
        self.rows, self.limit, self.open = rows, limit, 0
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)

    @property
    def waiting(self) -> int:
        return max(0, self.open - self.rows)

    def enter(self, count: int) -> None:
        """Take in so many answers of one request.

        Raises:
            ApiError: 429 if they do not fit now, 400 if they never do.
        """
        if count > self.rows + self.limit:
            raise refused(
                f"n: {count} answers were asked for, but this server holds {self.rows + self.limit}"
                " in all; ask for fewer at a time",
                "n",
            )
        if self.open + count > self.rows + self.limit:
            wait = self._seconds_to_wait()
            raise ApiError(
                429,
                f"all places are taken: {self.open} answers decode or wait; try again in {wait} "
                "seconds",
                kind="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": str(wait)},
            )
        self.open += count

    def leave(self, count: int, seconds: float | None = None) -> None:
        """Give places back.

        Args:
            count: How many.
            seconds: How long the answers took; None where they did not end by themselves.
        """
        self.open -= count
        if seconds is not None:
            self._seconds.append(seconds)

    def _seconds_to_wait(self) -> int:
        """About when a place is free: those who came first end one after the other."""
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else 1.0
        return min(_LONGEST_RETRY, max(1, math.ceil(mean / self.rows)))
