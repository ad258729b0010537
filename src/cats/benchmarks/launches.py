"""Which kernels a decode step launches, and how long each runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from cats.decode import Decoder
from cats.errors import ConfigError

# Steps before the profiler starts, and steps that it sees.
_BEFORE = 4
_STEPS = 16


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel, copy or fill: microseconds and number of launches per token."""

    name: str
    time: float
    calls: float


@dataclass(frozen=True, slots=True)
class Step:
    """A step as the device sees it.

    Attributes:
        launches: The longest first; two kernels may overlap.
        gaps: Microseconds per token in which nothing ran.
    """

    launches: list[Launch]
    gaps: float


def profile_steps(decoder: Decoder, ids: Tensor, **options: Any) -> Step:
    """Profile some steps of a generation on a GPU. The decoder must have run such steps before.

    Raises:
        ConfigError: If the model is not on a CUDA device.
    """
    if not ids.is_cuda:
        raise ConfigError("launches can be timed on a CUDA device only")
    profiler = torch.profiler.profile(activities=[ProfilerActivity.CUDA])
    count = 0

    def watch(_: Tensor) -> None:
        nonlocal count
        count += 1
        # steps run ahead of the tokens that are read: the device is emptied at both ends
        if count == _BEFORE:
            torch.cuda.synchronize()
            profiler.start()
        elif count == _BEFORE + _STEPS:
            torch.cuda.synchronize()
            profiler.stop()

    decoder.generate(ids, callback=watch, **options | {"max_new_tokens": 2 * _BEFORE + _STEPS})
    events = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]
    return summarize(events, steps=_STEPS)


def summarize(events: Iterable[tuple[str, float, float]], *, steps: int) -> Step:
    """Add up the launches ``(name, start, end)`` of several steps, in microseconds."""
    times: dict[str, list[float]] = {}
    gaps, busy_until = 0.0, None
    for name, start, end in sorted(events, key=lambda event: event[1]):
        times.setdefault(name, []).append(end - start)
        if busy_until is not None:
            gaps += max(0.0, start - busy_until)
        busy_until = end if busy_until is None else max(busy_until, end)
    launches = [Launch(name, sum(t) / steps, len(t) / steps) for name, t in times.items()]
    return Step(sorted(launches, key=lambda launch: -launch.time), gaps / steps)
