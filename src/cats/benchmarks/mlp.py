"""``cats bench mlp``: one call of the gated MLP against the best dense one and the memory limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from cats.benchmarks import mlp_codes
from cats.benchmarks.mlp_case import Case, Weights
from cats.benchmarks.mlp_codes import CodedWeights
from cats.benchmarks.mlp_variants import (
    Mlp,
    check,
    default_backends,
    dense_variants,
    sparse_variants,
)
from cats.benchmarks.timing import MIN_CALLS, Timing, cache_size, read_bandwidth, time_passes
from cats.results import DENSE_MLPS as DENSE
from cats.results import PAPER_MLP as PAPER
from cats.results import TORCH_INT4, MLPBandwidth, MLPTime, Value, environment

__all__ = ["PAPER", "Case", "Weights", "check", "measure"]

# variant, sparsity
_Key = tuple[str, float]
_NEIGHBOUR_ALONE: _Key = ("", 0.0)


def measure(case: Case, *, commit: str | None = None) -> Iterator[MLPBandwidth | MLPTime]:
    """Check every backend, then time it and the dense baselines, all in turns.

    The calls go through several copies of the weights, which have at least four times the size of
    the last-level cache.

    Args:
        case: What to time.
        commit: Commit of the sources, where they are not a checkout.

    Yields:
        The read bandwidth, then a result for each variant, sparsity and neighbour.

    Raises:
        BackendError: If a backend cannot run here, or computes something else than the reference.
    """
    device = torch.device(case.device)
    fields: _CaseFields = {
        "hidden_size": case.hidden_size,
        "intermediate_size": case.intermediate_size,
        "dtype": str(case.dtype).removeprefix("torch."),
        "batch": case.batch,
        "environment": environment(case.device, commit=commit),
    }
    if case.bits is not None:
        fields |= {"bits": case.bits, "group_size": case.group_size}
    read = read_bandwidth(device, size=case.size, rounds=max(case.rounds // 2, 2))
    rate = read.as_rate(case.size / 1e9)
    yield MLPBandwidth(**fields, **rate.quartiles, bytes=case.size)

    x = torch.randn(case.batch, case.hidden_size, device=device, dtype=case.dtype)
    make = Weights.random if case.bits is None else CodedWeights.random
    first = make(case)
    copies = max(2, -(-4 * cache_size(device) // round(first.bytes_read("", 1.0))))
    runs = _checked_runs(case, x, [first, *(make(case) for _ in range(copies - 1))])
    # a CUDA graph of few calls would show the cost of its launch
    repeats = max(1, -(-MIN_CALLS // copies)) if device.type == "cuda" else 1
    neighbours: dict[str, Callable[[Tensor], Tensor] | None] = {"none": None}
    if device.type == "cuda":
        neighbours["rmsnorm"] = torch.compile(_rms_norm)
    for neighbour, norm in neighbours.items():
        timings = _time(case, runs, x, repeats, norm)
        for (name, sparsity), timing in timings.items():
            share = runs[name, sparsity].kept_share
            bytes_read = first.bytes_read(name, share)
            yield MLPTime(
                **fields,
                **timing.scaled(1e6).quartiles,
                variant=name,
                neighbour=neighbour,
                sparsity=sparsity,
                kept_share=share,
                limit_us=bytes_read / case.size * read.median * 1e6,
                copies=copies,
                calls=repeats * copies,
            )


class _CaseFields(TypedDict):
    """The fields that all records of a case share."""

    hidden_size: int
    intermediate_size: int
    dtype: str
    batch: int
    environment: dict[str, Value]
    bits: NotRequired[int]
    group_size: NotRequired[int | None]


@dataclass(frozen=True, slots=True)
class _Run:
    """One variant at one sparsity.

    Attributes:
        rotation: The copies of the weights, which the calls go through.
        kept_share: Share of the neurons whose rows of up and columns of down are read.
    """

    mlp: Mlp
    rotation: list[Weights]
    kept_share: float


def _checked_runs(case: Case, x: Tensor, copies: list[Weights]) -> dict[_Key, _Run]:
    """Every variant at every sparsity; dense baselines at sparsity 0 only."""
    first = copies[0]
    in_codes = isinstance(first, CodedWeights)
    if isinstance(first, CodedWeights):
        backends = case.backends or mlp_codes.default_backends(x, first)
    else:
        backends = case.backends or default_backends(x, first)
    runs: dict[_Key, _Run] = {}
    for sparsity in sorted({0.0, *case.sparsities}):
        rotation = [weights.at(x, sparsity) for weights in copies]
        share = sum(weights.kept_share(x) for weights in rotation) / len(rotation)
        variants = (
            mlp_codes.sparse_variants(backends) if in_codes else sparse_variants(case, backends)
        )
        if sparsity == 0:
            variants |= dense_variants(case) | (mlp_codes.dense_variants(case) if in_codes else {})
        for name, mlp in variants.items():
            check(name, mlp, x, rotation[0])
            is_dense = name in (*DENSE, TORCH_INT4)
            runs[name, sparsity] = _Run(mlp, rotation, 1.0 if is_dense else share)
    return runs


def _rms_norm(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _time(
    case: Case,
    runs: dict[_Key, _Run],
    x: Tensor,
    repeats: int,
    norm: Callable[[Tensor], Tensor] | None,
) -> dict[_Key, Timing]:
    """Time of one MLP; with a neighbour, of one MLP and one neighbour less one neighbour."""
    calls = repeats * len(next(iter(runs.values())).rotation)

    def one_pass(run: _Run | None) -> Callable[[], object]:
        def call_all() -> None:
            y = x
            for weights in run.rotation * repeats if run else [None] * calls:
                y = y if norm is None else norm(y)
                if run is not None and weights is not None:
                    y = run.mlp(x, weights)

        return call_all

    passes: dict[_Key, Callable[[], object]] = {key: one_pass(run) for key, run in runs.items()}
    if norm is not None:
        passes[_NEIGHBOUR_ALONE] = one_pass(None)
    timings = time_passes(passes, calls, device=x.device, rounds=case.rounds)
    if norm is None:
        return timings
    alone = timings.pop(_NEIGHBOUR_ALONE).median
    return {key: timing.less(alone) for key, timing in timings.items()}
