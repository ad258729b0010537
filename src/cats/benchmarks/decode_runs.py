"""One generation and when its tokens came: through the decode loop, and through transformers."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from cats.benchmarks.timing import Timing
from cats.decode import Decoder
from cats.protocols import CausalModel


@dataclass(frozen=True, slots=True)
class Run:
    """One generation.

    Attributes:
        tokens: Prompts and new tokens, ``[B, T + N]``.
        times: When each step's tokens were there, in seconds after the start.
    """

    tokens: Tensor
    times: list[float]

    @property
    def seconds_per_token(self) -> float:
        """Mean time of a step after the first, which runs the prompt."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def token_milliseconds(runs: Iterable[Run]) -> Timing:
    """Time of a token after the first one."""
    return Timing.of([1e3 * run.seconds_per_token for run in runs])


def first_token_milliseconds(runs: Iterable[Run]) -> Timing:
    return Timing.of([1e3 * run.times[0] for run in runs])


def run_loop(decoder: Decoder, ids: Tensor, **options: Any) -> Run:
    """Generate with the decode loop. The next run cannot use what this one leaves in the cache."""
    start, times = time.perf_counter(), list[float]()
    tokens = decoder.generate(
        ids, callback=lambda _: times.append(time.perf_counter() - start), **options
    )
    # another first token than the prompt's, so that no prefix is shared; buffers and steps stay
    other = (ids[:, :1] == 0).long()
    decoder.generate(other, **options | {"max_new_tokens": 1})
    return Run(tokens, times)


def run_transformers(model: nn.Module, ids: Tensor, **options: Any) -> Run:
    """Generate with ``model.generate``; options as it takes them."""
    from transformers import StoppingCriteriaList

    times: list[float] = []

    def note_time(tokens: Tensor, scores: object) -> Tensor:
        if tokens.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    start = time.perf_counter()
    tokens = cast(CausalModel, model).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        stopping_criteria=StoppingCriteriaList([note_time]),
        **options,
    )
    return Run(tokens, times)
