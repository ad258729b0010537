"""How much a model can skip while its perplexity rises by no more than a limit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from cats.apply import densify_, sparsify_
from cats.config import CatsConfig
from cats.errors import ConfigError
from cats.metrics import perplexity
from cats.recipes.progress import Progress, duration

# The search starts on this share of the batches, 1 / 4.
_PART = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class LargestSparsity:
    """The result of :func:`largest_sparsity`.

    Attributes:
        config: The thresholds.
        perplexity_dense: Perplexity of the dense model on all batches.
    """

    config: CatsConfig
    perplexity_dense: float


def largest_sparsity(
    model: nn.Module,
    config_at: Callable[[int], CatsConfig],
    batches: Sequence[Tensor],
    *,
    max_loss: float,
    most: int = 99,
    unit: str = "sparsity",
    progress: Progress | None = None,
) -> LargestSparsity:
    """The largest whole percentage whose perplexity is within the limit.

    A first search runs on a part of the text. A second one starts from its result and runs on all
    of the text, until one percentage is within the limit and the next one is not.

    Args:
        model: The dense model; it is dense again afterwards.
        config_at: Thresholds at a whole percentage, such as those of statistics at a sparsity.
        batches: Held-out token ids ``[B, T]`` each.
        max_loss: Allowed rise of the perplexity, as a share of that of the dense model.
        most: The largest percentage that there is.
        unit: What the percentage is of, for messages.
        progress: Shows how long the search will take, and each perplexity.

    Raises:
        ConfigError: If 1 % of sparsity exceeds the limit.
    """
    measured = _Perplexities(model, config_at, batches, progress or Progress())
    try:
        measured.of_part(0)
        measured.announce()
        dense = measured.of_all(0)
        percent = _search(measured, max_loss, most)
    finally:
        densify_(model)
    if percent == 0:
        raise ConfigError(
            f"even 1 % {unit} raises the held-out perplexity by more than {max_loss:.2%}: "
            "allow a larger --max-loss"
        )
    return LargestSparsity(config=config_at(percent), perplexity_dense=dense)


def _search(measured: _Perplexities, max_loss: float, most: int) -> int:
    # low is within the limit, high is not
    low, high = 0, most + 1

    def compare(percent: int, perplexity_at: Callable[[int], float]) -> None:
        nonlocal low, high
        within = perplexity_at(percent) / perplexity_at(0) - 1 <= max_loss
        low, high = (percent, high) if within else (low, percent)

    while high - low > 1:
        compare((low + high) // 2, measured.of_part)
    guess, low, high = max(low, 1), 0, most + 1
    # from the guess in steps of 1, 2, 4, ... percent until the limit lies between two of them
    compare(guess, measured.of_all)
    step = 1 if low == guess else -1
    while (high if step > 0 else low) in (0, most + 1) and high - low > 1:
        start = low if step > 0 else high
        compare(min(most, max(1, start + step)), measured.of_all)
        step *= 2
    while high - low > 1:
        compare((low + high) // 2, measured.of_all)
    return low


class _Perplexities:
    """Perplexity of a model at a percentage of sparsity, on a part of a text and on all of it.

    Nothing is measured twice: the value of the part is used for all of the text as well.
    """

    def __init__(
        self,
        model: nn.Module,
        config_at: Callable[[int], CatsConfig],
        batches: Sequence[Tensor],
        progress: Progress,
    ) -> None:
        self._model, self._config_at, self._progress = model, config_at, progress
        cut = max(1, len(batches) // _PART)
        self._pieces = [piece for piece in (batches[:cut], batches[cut:]) if piece]
        # the first token of a block is not predicted
        self._tokens = [sum(b[:, 1:].numel() for b in piece) for piece in self._pieces]
        self._known: dict[tuple[int, int], float] = {}
        self._seconds = 0.0

    def of_part(self, percent: int) -> float:
        """Perplexity on the part; 0 % is the dense model."""
        return self._of_piece(percent, 0)

    def of_all(self, percent: int) -> float:
        """Perplexity on all of the text; 0 % is the dense model."""
        losses = [math.log(self._of_piece(percent, i)) for i in range(len(self._pieces))]
        total = sum(loss * n for loss, n in zip(losses, self._tokens, strict=True))
        return math.exp(total / sum(self._tokens))

    def announce(self) -> None:
        """Say how long one perplexity takes, estimated from the last one."""
        of_part = duration(self._seconds)
        of_all = duration(self._seconds * sum(self._tokens) / self._tokens[0])
        self._progress.say(
            f"One perplexity takes about {of_part} on a part of the held-out text and {of_all} on "
            "all of it. The search needs about 8 on the part and 3 on all."
        )

    def _of_piece(self, percent: int, i: int) -> float:
        if (percent, i) not in self._known:
            if percent:
                sparsify_(self._model, self._config_at(percent))
            else:
                densify_(self._model)
            start = time.perf_counter()
            text = f"at {percent} %, " + ("a part" if i == 0 else "the rest")
            batches = self._progress.track(self._pieces[i], text)
            self._known[percent, i] = perplexity(self._model, batches)
            self._seconds = time.perf_counter() - start
        return self._known[percent, i]
