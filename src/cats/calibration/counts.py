"""Counts of float32 values by bit pattern: a histogram that needs no range and merges exactly."""

from collections.abc import Callable

import torch
from torch import Tensor

# Sign, exponent and 12 bits of the mantissa: 2**21 bins, 16 MiB, each 1/4096 of its values wide.
_MANTISSA_BITS = 12
_SHIFT = 23 - _MANTISSA_BITS
BINS = 1 << (9 + _MANTISSA_BITS)
_EXPERT_SHIFT = 16
EXPERT_BINS = 1 << (32 - _EXPERT_SHIFT)


def count(values: Tensor) -> Tensor:
    """How many of the values fall into each bin.

    Args:
        values: Any shape, floating point; bfloat16 and float16 values are represented exactly.

    Returns:
        ``[BINS]``, int64, on the device of ``values``.
    """
    bits = values.float().flatten().view(torch.int32)
    # the shift fills with the sign bit, which the mask removes
    return torch.bincount((bits >> _SHIFT) & (BINS - 1), minlength=BINS)


def count_by_expert(values: Tensor, experts: Tensor, number: int) -> Tensor:
    """How many of the values of each expert fall into each bin, in bins as wide as in bfloat16.

    With the bins of :func:`count`, hundreds of experts per layer would take gigabytes per layer.

    Args:
        values: ``[rows, F]``.
        experts: ``[rows]``, the expert of each row.
        number: How many experts there are, ``E``.

    Returns:
        ``[E, EXPERT_BINS]``, int64.
    """
    bits = (values.float().view(torch.int32) >> _EXPERT_SHIFT) & (EXPERT_BINS - 1)
    bins = (experts.long()[:, None] * EXPERT_BINS + bits).flatten()
    return torch.bincount(bins, minlength=number * EXPERT_BINS).view(number, EXPERT_BINS)


def widened(expert_counts: Tensor) -> Tensor:
    """One row of :func:`count_by_expert` in the bins of :func:`count`."""
    counts = torch.zeros(BINS, dtype=torch.int64)
    counts[:: BINS // EXPERT_BINS] = expert_counts
    return counts


def bin_values(bins: Tensor) -> Tensor:
    """The value of smallest magnitude in each bin, float32."""
    return (bins << _SHIFT).to(torch.int32).view(torch.float32)


def threshold_at(
    counts: Tensor, score: Callable[[Tensor], Tensor], target: float
) -> tuple[Tensor, float]:
    """The threshold on ``score(value)`` that drops the target fraction of the values.

    The error is at most half the mass that shares one score plus the mass of a bin on each branch
    of ``score``: about 0.03 % for a smooth density.

    Args:
        counts: From :func:`count`.
        score: Maps values to non-negative float32 scores of the same shape.
        target: Fraction of the values to drop, inside (0, 1).

    Returns:
        The threshold, a float32 scalar, and the fraction of the counted values that it drops.
    """
    scores, below = _scores_and_fractions_below(counts, score)
    i = int((below - target).abs().argmin())
    if i == 0:
        return torch.zeros(()), fraction_dropped(counts, score)
    return _between(scores[i - 1], scores[i]), float(below[i])


def fraction_dropped(counts: Tensor, score: Callable[[Tensor], Tensor]) -> float:
    """Fraction of the values whose score is exactly zero: a threshold of 0 drops them too."""
    bins = counts.nonzero()[:, 0]
    zero = score(bin_values(bins)) == 0
    return float(counts[bins][zero].sum() / counts.sum())


def _scores_and_fractions_below(
    counts: Tensor, score: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The distinct scores in rising order, and the fraction of values with a smaller score."""
    bins = counts.nonzero()[:, 0]
    scores, score_index = torch.unique(score(bin_values(bins)), return_inverse=True)
    mass = torch.zeros_like(scores, dtype=torch.int64).index_add_(0, score_index, counts[bins])
    return scores, (mass.cumsum(0) - mass).double() / counts.sum()


def _between(dropped: Tensor, kept: Tensor) -> Tensor:
    """The middle of two neighbouring scores; the upper one if float32 has no number between them.

    Another device may compute an activation that differs in the last bit. If the threshold were a
    score itself, that bit would decide about all values that share the score.
    """
    middle = (dropped.double() / 2 + kept.double() / 2).float()
    return middle if middle > dropped else kept.clone()
