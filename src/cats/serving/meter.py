"""The speed of one stream, and how much of the weights it reads, while it runs."""

from __future__ import annotations

from collections import deque
from typing import Any

_WINDOW = 1.0


class Meter:
    """What ``stream_options.include_meter`` adds to the chunks of a stream.

    A token whose reads are counted takes longer than the others. Its time says nothing of the speed
    of streams that are not counted, and is left out.
    """

    def __init__(self, *, is_sparse: bool) -> None:
        self._weights_read = None if is_sparse else 1.0
        # the last chunks: when they came, the seconds before them, and their tokens
        self._chunks: deque[tuple[float, float, int]] = deque()
        self._last: tuple[float, int] | None = None

    def add(self, tokens: int, now: float, reads: list[tuple[int, float]]) -> dict[str, Any]:
        """What to show after some new tokens.

        Args:
            tokens: How many there are in all.
            now: Seconds, from any start.
            reads: What was counted; see :attr:`cats.decode.rows.OpenSession.reads`.
        """
        if self._last is not None:
            before, old = self._last
            counted = bool(reads) and reads[-1][0] > old
            if not counted:
                self._chunks.append((now, now - before, tokens - old))
        self._last = now, tokens
        while len(self._chunks) > 1 and now - self._chunks[0][0] >= _WINDOW:
            self._chunks.popleft()
        if reads:
            self._weights_read = reads[-1][1]
        seconds = sum(chunk[1] for chunk in self._chunks)
        new = sum(chunk[2] for chunk in self._chunks)
        return {
            "tokens": tokens,
            "tokens_per_second": new / seconds if seconds else None,
            "weights_read": self._weights_read,
        }
