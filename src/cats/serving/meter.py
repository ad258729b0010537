"""The speed of one stream, and how much of the weights it reads, while it runs."""

from __future__ import annotations

from collections import deque
from typing import Any

_WINDOW = 1.0


class Meter:
    """What ``stream_options.include_meter`` adds to the chunks of a stream."""

    def __init__(self, *, is_sparse: bool) -> None:
        self._weights_read = None if is_sparse else 1.0
        # when how many tokens had come
        self._times: deque[tuple[float, int]] = deque()
        self._tokens = 0

    def add(self, tokens: int, now: float, reads: list[tuple[int, float]]) -> dict[str, Any]:
        """What to show after some new tokens.

        Args:
            tokens: How many there are in all.
            now: Seconds, from any start.
            reads: What was counted; see :attr:`cats.decode.rows.OpenSession.reads`.
        """
        self._times.append((now, tokens))
        while len(self._times) > 2 and now - self._times[1][0] >= _WINDOW:
            self._times.popleft()
        first, before = self._times[0]
        if reads:
            self._weights_read = reads[-1][1]
        return {
            "tokens": tokens,
            "tokens_per_second": (tokens - before) / (now - first) if now > first else None,
            "weights_read": self._weights_read,
        }
