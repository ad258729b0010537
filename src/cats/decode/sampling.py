"""Choose the next token: transformers' logits processors as a few tensor operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cats.errors import ConfigError, LogitsError

_COLUMNS = 128
# Instead of a token where none can be drawn.
NO_TOKEN = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a token is chosen; names and order of application are those of transformers.

    Attributes:
        do_sample: Draw a token; otherwise the likeliest is taken.
        temperature: Divides the logits.
        top_k: How many of the likeliest tokens are kept; 0 keeps all.
        top_p: The likeliest tokens are kept until their probabilities reach this sum; 1 keeps all.
        min_p: Tokens are kept that have at least this share of the likeliest token's probability;
            0 keeps all.
        repetition_penalty: Divides the positive logits of tokens that occurred, and multiplies the
            negative ones.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(
                f"temperature must be positive, got {self.temperature}; "
                "do_sample=False takes the likeliest token"
            )
        if self.top_k < 0:
            raise ConfigError(f"expected top_k >= 0, got {self.top_k}")
        if not 0 <= self.top_p <= 1:
            raise ConfigError(f"expected top_p in [0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"expected min_p in [0, 1], got {self.min_p}")
        if not self.repetition_penalty > 0:
            raise ConfigError(f"repetition_penalty must be positive, got {self.repetition_penalty}")


def process(logits: Tensor, seen: Tensor | None, sampling: Sampling) -> Tensor:
    """Scores ``[B, V]``, float32; tokens that cannot be drawn have ``-inf``.

    Args:
        logits: ``[B, V]``.
        seen: Whether a token occurred in the row, ``[B, V]``; needed for a repetition penalty.
        sampling: What to apply.
    """
    scores = logits.float()
    if sampling.repetition_penalty != 1:
        assert seen is not None
        penalty = sampling.repetition_penalty
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(seen, penalised, scores)
    if not sampling.do_sample:
        return scores
    if sampling.temperature != 1:
        scores = scores / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        scores = _keep(scores, scores >= scores.topk(sampling.top_k).values[:, -1:])
    if sampling.top_p < 1:
        scores = _keep(scores, _nucleus(scores, sampling.top_p))
    if sampling.min_p > 0:
        probabilities = scores.softmax(-1)
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        scores = _keep(scores, probabilities >= least)
    return scores


def choose(scores: Tensor, noise: Tensor | None) -> Tensor:
    """One token per row, ``[B]``: the likeliest, or with noise one drawn by its probability.

    Args:
        scores: ``[B, V]``, of :func:`process`.
        noise: ``[B, V]``, independent draws from the exponential distribution. Among draws with
            rates ``p``, number ``i`` is the smallest with probability ``p[i]``.

    Returns:
        Tokens, with ``NO_TOKEN`` where the probabilities are NaN. Without noise, the first NaN
        counts as the likeliest, as in transformers.
    """
    if noise is None:
        return _largest(scores)
    weights = scores.softmax(-1) / noise
    chosen = _largest(weights)
    return chosen.masked_fill(weights.gather(-1, chosen[:, None])[:, 0].isnan(), NO_TOKEN)


def check_drawn(tokens: Tensor) -> None:
    """
    Args:
        tokens: The chosen tokens, ``[B]``, on the CPU.

    Raises:
        LogitsError: If no token could be drawn for a row.
    """
    failed = (tokens == NO_TOKEN).nonzero()
    if len(failed):
        raise LogitsError(
            f"no token can be drawn for row {int(failed[0])}: the model's logits are NaN or "
            "infinite, or every token was ruled out; check its weights and dtype"
        )


def _largest(scores: Tensor) -> Tensor:
    """``argmax`` over ``[B, V]``, the first of equals; NaN counts as the largest.

    A GPU reduces a row of 128,256 tokens in one block, which takes 28 microseconds. In two steps,
    with the row as a table, it takes 5.
    """
    rows, size = scores.shape
    if not scores.is_cuda or size % _COLUMNS or size < _COLUMNS**2:
        return scores.argmax(-1)
    table = scores.view(rows, -1, _COLUMNS)
    line = table.amax(-1).argmax(-1, keepdim=True)
    column = table.gather(1, line[..., None].expand(-1, -1, _COLUMNS))[:, 0].argmax(-1)
    return line[:, 0] * _COLUMNS + column


def _keep(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, -torch.inf)


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    ascending, order = scores.sort(-1)
    mask = ascending.softmax(-1).cumsum(-1) > 1 - top_p
    mask[:, -1] = True  # whatever the rounding of the sum
    return torch.zeros_like(mask).scatter(-1, order, mask)
