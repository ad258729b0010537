"""The largest sparsity that a model bears: its perplexity rises by no more than a limit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cats.apply import densify_, sparsify_
from cats.calibration import Statistics
from cats.errors import ConfigError
from cats.metrics import perplexity
from cats.recipes.progress import Progress, duration

# The search starts on one batch of so many.
_PART = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class LargestSparsity:
    """What the search found.

    Attributes:
        target_sparsity: A whole percentage, as a share.
        perplexity_dense: Of the dense model, on the whole text.
    """

    target_sparsity: float
    perplexity_dense: float


def largest_sparsity(
    model: Any,
    statistics: Statistics,
    batches: Sequence[Tensor],
    *,
    max_loss: float,
    progress: Progress | None = None,
) -> LargestSparsity:
    """The largest whole percentage whose perplexity is within the limit.

    Percentages are compared on a part of the text. What is found there is confirmed on the whole:
    it is within the limit, and one percent more is not; otherwise the search goes on there.

    Args:
        model: The dense model, and dense again afterwards.
        statistics: Of the model, see :func:`cats.collect`; of a method that has a target.
        batches: Held-out token ids ``[B, T]`` each.
        max_loss: How much the perplexity may rise, as a share of that of the dense model.
        progress: Told how long the search will take, and of each perplexity.

    Raises:
        ConfigError: If even 1 % is too much.
    """
    measured = _Perplexities(model, statistics, batches, progress or Progress())
    try:
        measured.of_part(0)
        measured.announce()
        dense = measured.of_whole(0)
        percent = _search(measured, max_loss)
    finally:
        densify_(model)
    if percent == 0:
        raise ConfigError(
            f"even 1 % sparsity raises the held-out perplexity by more than {max_loss:.2%}: "
            "allow a larger --max-loss"
        )
    return LargestSparsity(target_sparsity=percent / 100, perplexity_dense=dense)


def _search(measured: _Perplexities, max_loss: float) -> int:
    low, high = 0, 100

    def look(percent: int, of: Callable[[int], float]) -> None:
        nonlocal low, high
        within = of(percent) / of(0) - 1 <= max_loss
        low, high = (percent, high) if within else (low, percent)

    while high - low > 1:
        look((low + high) // 2, measured.of_part)
    guess, low, high = max(low, 1), 0, 100
    # from the guess in steps of 1, 2, 4, ... percent until the limit lies between two of them
    look(guess, measured.of_whole)
    step = 1 if low == guess else -1
    while (high if step > 0 else low) in (0, 100) and high - low > 1:
        start = low if step > 0 else high
        look(min(99, max(1, start + step)), measured.of_whole)
        step *= 2
    while high - low > 1:
        look((low + high) // 2, measured.of_whole)
    return low


class _Perplexities:
    """Perplexity of a model at a percentage of sparsity, on a part of a text and on all of it.

    Nothing is measured twice: what the part gave counts for the whole as well.
    """

    def __init__(
        self, model: Any, statistics: Statistics, batches: Sequence[Tensor], progress: Progress
    ) -> None:
        self._model, self._statistics, self._progress = model, statistics, progress
        cut = max(1, len(batches) // _PART)
        self._pieces = [piece for piece in (batches[:cut], batches[cut:]) if piece]
        # predicted tokens: of all but the first of each block
        self._tokens = [sum(b[:, 1:].numel() for b in piece) for piece in self._pieces]
        self._found: dict[tuple[int, int], float] = {}
        self._seconds = 0.0

    def of_part(self, percent: int) -> float:
        """On the part; 0 % is the dense model."""
        return self._of(percent, 0)

    def of_whole(self, percent: int) -> float:
        """On the whole text; 0 % is the dense model."""
        losses = [math.log(self._of(percent, i)) for i in range(len(self._pieces))]
        total = sum(loss * n for loss, n in zip(losses, self._tokens, strict=True))
        return math.exp(total / sum(self._tokens))

    def announce(self) -> None:
        """Say how long one perplexity takes, by the one that was measured last."""
        whole = self._seconds * sum(self._tokens) / self._tokens[0]
        self._progress.say(
            f"One perplexity takes about {duration(self._seconds)} on a part of the held-out text "
            f"and {duration(whole)} on all of it. The search needs about 8 of a part and 3 of all."
        )

    def _of(self, percent: int, i: int) -> float:
        if (percent, i) not in self._found:
            if percent:
                sparsify_(self._model, self._statistics.config(percent / 100))
            else:
                densify_(self._model)
            start = time.perf_counter()
            text = f"at {percent} %, " + ("a part" if i == 0 else "the rest")
            batches = self._progress.track(self._pieces[i], text)
            self._found[percent, i] = perplexity(self._model, batches)
            self._seconds = time.perf_counter() - start
        return self._found[percent, i]
