"""Sessions on one model, and when their tokens came."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from cats.decode import OpenSession, Sessions


class TimedSession:
    """A session that notes when each of its tokens was there.

    Attributes:
        opened: When it was opened, in seconds of ``time.perf_counter``.
        times: When its tokens came, and at last its end.
    """

    def __init__(self, sessions: Sessions, prompt: Tensor, new_tokens: int) -> None:
        """
        Args:
            sessions: Where it is opened.
            prompt: Token ids, ``[T]``.
            new_tokens: It ends after so many.
        """
        self.opened, self.times = time.perf_counter(), list[float]()
        self.session: OpenSession = sessions.open(
            prompt,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            on_change=lambda: self.times.append(time.perf_counter()),
        )

    def wait_for(self, count: int) -> None:
        """Wait until so many tokens have come."""
        tokens = self.session.tokens()
        for _ in range(count):
            next(tokens)

    @property
    def first(self) -> float:
        """Seconds until the first token."""
        return self.times[0] - self.opened

    @property
    def latency(self) -> float:
        """Seconds until the last token."""
        return self.token_times[-1] - self.opened

    @property
    def token_times(self) -> Sequence[float]:
        return self.times[: len(self.session.so_far())]

    @property
    def gaps(self) -> list[float]:
        """Seconds between each two tokens."""
        times = self.token_times
        return [later - earlier for earlier, later in pairwise(times)]
