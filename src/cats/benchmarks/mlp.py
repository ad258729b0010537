"""``cats bench mlp``: one call of the gated MLP against the best dense one and the memory limit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F_

from cats import ops
from cats.benchmarks.timing import MIN_CALLS, Timing, cache_size, read_bandwidth, time_passes
from cats.errors import BackendError, ConfigError
from cats.functional import keep_mask
from cats.ops.mlp import reference
from cats.ops.mlp.backends import why_refused
from cats.results import DENSE_MLPS as DENSE
from cats.results import PAPER_MLP as PAPER
from cats.results import MLPBandwidth, MLPTime, environment

# Largest accepted norm of the error over the norm of the output, against float64.
ERROR_LIMIT = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}
# Dense baselines round gate, up and their product as well.
DENSE_ERROR_LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

Mlp = Callable[[Tensor, "Weights"], Tensor]
# variant, sparsity
_Key = tuple[str, float]
_NEIGHBOUR_ALONE: _Key = ("", 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is timed: ``[batch, D]`` through ``[F, D]`` at several sparsities.

    ``size`` is the number of bytes that the read bandwidth is measured over; ``rounds`` the number
    of timed passes; ``compiled`` whether torch.compile's dense MLP, slow to build, is timed.
    """

    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype = torch.bfloat16
    batch: int = 1
    sparsities: tuple[float, ...] = (0.0, 0.5, 0.7, 0.9)
    backends: tuple[str, ...] = ()
    device: str = "cuda"
    rounds: int = 50
    size: int = 4 * 2**30
    compiled: bool = True

    def __post_init__(self) -> None:
        if min(self.hidden_size, self.intermediate_size, self.batch) < 1:
            raise ConfigError("shape and batch must be positive")
        if not all(0 <= s < 1 for s in self.sparsities):
            raise ConfigError(f"sparsities must lie in [0, 1), got {list(self.sparsities)}")
        if self.rounds < 2:
            raise ConfigError(f"rounds must be at least 2, got {self.rounds}")


@dataclass(frozen=True, slots=True)
class Weights:
    """One MLP, each matrix in the layout that the operator reads, with its thresholds.

    ``merged`` is gate and up in one matrix, ``down_rows`` is row-major: what dense models hold.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    thresholds: Tensor
    merged: Tensor
    down_rows: Tensor

    @classmethod
    def random(cls, case: Case) -> "Weights":
        D, F = case.hidden_size, case.intermediate_size

        def normal(*shape: int, scale: float) -> Tensor:
            return torch.randn(shape, device=case.device, dtype=case.dtype).mul_(scale)

        merged = normal(2 * F, D, scale=D**-0.5)
        down = normal(F, D, scale=(0.36 * F) ** -0.5).t()
        thresholds = torch.zeros(F, device=case.device)
        return cls(merged[:F], merged[F:], down, thresholds, merged, down.contiguous())

    def at(self, x: Tensor, sparsity: float) -> "Weights":
        """The same weights with the threshold below which that share of this ``x``'s gates lies."""
        gates = activated_gates(x, self).abs()
        threshold = _between(gates.flatten().sort().values, sparsity) if sparsity else 0.0
        thresholds = torch.full_like(self.thresholds, threshold)
        return Weights(self.gate, self.up, self.down, thresholds, self.merged, self.down_rows)


def measure(case: Case, *, commit: str | None = None) -> Iterator[MLPBandwidth | MLPTime]:
    """Check every backend, then time it and the dense baselines, all in turns.

    Yields the read bandwidth, then a result for each variant, sparsity and neighbour. Weights are
    rotated over copies of at least four times the last-level cache.

    Args:
        commit: Of the sources, where they are no checkout.

    Raises:
        BackendError: If a backend cannot run here, or computes something else than the reference.
    """
    device = torch.device(case.device)
    where = environment(case.device, commit=commit)
    limit = read_bandwidth(device, size=case.size, rounds=max(case.rounds // 2, 2))
    yield _bandwidth_result(case, limit, where)

    x = torch.randn(case.batch, case.hidden_size, device=device, dtype=case.dtype)
    copies = [Weights.random(case) for _ in range(_copies(case, cache_size(device)))]
    backends = case.backends or _default_backends(x, copies[0])
    runs: dict[_Key, _Run] = {}
    for sparsity in sorted({0.0, *case.sparsities}):
        rotation = [weights.at(x, sparsity) for weights in copies]
        share = sum(_kept_share(x, weights) for weights in rotation) / len(rotation)
        for name, mlp in _variants(case, backends, sparsity).items():
            check(name, mlp, x, rotation[0])
            runs[name, sparsity] = _Run(mlp, rotation, 1.0 if name in DENSE else share)
    # a CUDA graph of few calls would show the cost of its launch
    repeats = max(1, -(-MIN_CALLS // len(copies))) if device.type == "cuda" else 1
    neighbours: dict[str, Callable[[Tensor], Tensor] | None] = {"none": None}
    if device.type == "cuda":
        neighbours["rmsnorm"] = torch.compile(_rms_norm)
    for neighbour, norm in neighbours.items():
        timings = _time(case, runs, x, repeats, norm, device)
        for (name, sparsity), timing in timings.items():
            share = runs[name, sparsity].kept_share
            bound = (1 + 2 * share) / 3 * _bytes(case) / case.size * limit.median
            yield MLPTime(
                value=timing.median * 1e6, low=timing.low * 1e6, high=timing.high * 1e6,
                samples=timing.samples,
                variant=name, neighbour=neighbour, sparsity=sparsity, kept_share=share,
                limit_us=bound * 1e6, copies=len(copies), calls=repeats * len(copies),
                environment=where, **_shape(case),
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Run:
    """One variant at one sparsity: what is called, over which weights, and the share it keeps."""

    mlp: Mlp
    rotation: list[Weights]
    kept_share: float


def check(name: str, mlp: Mlp, x: Tensor, weights: Weights) -> None:
    """Raise BackendError unless ``mlp`` agrees with the definition in float64."""
    w = weights
    exact = reference.gated_mlp(
        ops.GatedMLPArguments(
            x.double(), w.gate.double(), w.up.double(), w.down.double(), w.thresholds, "silu"
        )
    )
    error = ((mlp(x, weights).double() - exact).norm() / exact.norm()).item()
    limit = (DENSE_ERROR_LIMIT if name in (*DENSE, "dense") else ERROR_LIMIT)[x.dtype]
    # written so that NaN fails
    if not error <= limit:
        raise BackendError(
            f"{name} is wrong for {list(weights.gate.shape)} {x.dtype}, batch {len(x)}: relative "
            f"error {error:.1e}, at most {limit:.1e} is rounding; it is not timed"
        )


def activated_gates(x: Tensor, weights: Weights) -> Tensor:
    """``silu(gate @ x)`` in float64, ``[B, F]``."""
    return F_.silu(x.double() @ weights.gate.double().t())


def _between(ordered: Tensor, sparsity: float) -> float:
    """A number in the widest gap near that quantile, so that no rounding moves a value past it."""
    middle = min(round(sparsity * len(ordered)), len(ordered) - 1)
    reach = len(ordered) // 200
    near = ordered[max(0, middle - reach - 1) : middle + reach + 1]
    if len(near) < 2:
        return near[0].item()
    widest = near.diff().argmax()
    return (near[widest] + near[widest + 1]).item() / 2


def _kept_share(x: Tensor, weights: Weights) -> float:
    """Share of neurons that at least one token keeps."""
    return keep_mask(activated_gates(x, weights), weights.thresholds).any(0).double().mean().item()


def _variants(case: Case, backends: Sequence[str], sparsity: float) -> dict[str, Mlp]:
    """The sparse kernels, and at sparsity 0 the dense baselines too."""

    def backend(name: str) -> Mlp:
        return lambda x, w: ops.gated_mlp(
            x, w.gate, w.up, w.down, w.thresholds, "silu", backend=name
        )

    variants = {name: backend(name) for name in backends if name != PAPER}
    if PAPER in backends:
        if case.batch != 1:
            raise BackendError("the paper's kernels take one token")
        variants[PAPER] = _paper
    return variants | _dense_variants(case) if sparsity == 0 else variants


def _paper(x: Tensor, w: Weights) -> Tensor:
    # imported on first use: Triton is optional
    from cats.benchmarks import paper_kernels

    return paper_kernels.gated_mlp(x, w.gate, w.up, w.down, w.thresholds)


def _dense_variants(case: Case) -> dict[str, Mlp]:
    def eager(x: Tensor, w: Weights) -> Tensor:
        return F_.linear(F_.silu(F_.linear(x, w.gate)) * F_.linear(x, w.up), w.down_rows)

    def merged(x: Tensor, w: Weights) -> Tensor:
        g, u = F_.linear(x, w.merged).chunk(2, dim=-1)
        return F_.linear(F_.silu(g) * u, w.down_rows)

    variants: dict[str, Mlp] = dict(zip(DENSE, (eager, merged), strict=False))
    if case.compiled:
        variants[DENSE[2]] = _compiled(case)
    return variants


def _compiled(case: Case) -> Mlp:
    def layer(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F_.linear(F_.silu(F_.linear(x, gate)) * F_.linear(x, up), down)

    options: dict[str, str | int | bool | Callable[..., object]] = {}
    if case.device != "cpu":
        options = {"max_autotune": True, "coordinate_descent_tuning": True}
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, options=options)
    return lambda x, w: compiled(x, w.gate, w.up, w.down_rows)


def _rms_norm(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _time(
    case: Case,
    runs: dict[_Key, _Run],
    x: Tensor,
    repeats: int,
    norm: Callable[[Tensor], Tensor] | None,
    device: torch.device,
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
    if norm is None:
        return time_passes(passes, calls, device=device, rounds=case.rounds)
    passes[_NEIGHBOUR_ALONE] = one_pass(None)
    timings = time_passes(passes, calls, device=device, rounds=case.rounds)
    alone = timings.pop(_NEIGHBOUR_ALONE).median
    return {key: timing.less(alone) for key, timing in timings.items()}


def _default_backends(x: Tensor, weights: Weights) -> tuple[str, ...]:
    """The sparse backends that take this call, and on a GPU, for one token, the paper's kernels."""
    w = weights
    arguments = ops.GatedMLPArguments(x, w.gate, w.up, w.down, w.thresholds, "silu")
    names = ("cuda", "triton") if x.is_cuda else ("cpu",)
    reasons = {name: why_refused(name, arguments) for name in names}
    takers = tuple(name for name, reason in reasons.items() if reason is None)
    if not takers:
        raise BackendError(
            f"no sparse backend takes this case on {x.device}: "
            + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        )
    return (*takers, PAPER) if "triton" in takers and len(x) == 1 else takers


def _copies(case: Case, cache: int) -> int:
    return max(2, -(-4 * cache // _bytes(case)))


def _bytes(case: Case) -> int:
    """Of the three matrices."""
    return 3 * case.hidden_size * case.intermediate_size * case.dtype.itemsize


def _shape(case: Case) -> dict[str, Any]:
    return {
        "hidden_size": case.hidden_size,
        "intermediate_size": case.intermediate_size,
        "dtype": str(case.dtype).removeprefix("torch."),
        "batch": case.batch,
    }


def _bandwidth_result(
    case: Case, limit: Timing, where: dict[str, str | int | float | bool | None]
) -> MLPBandwidth:
    return MLPBandwidth(
        value=case.size / limit.median / 1e9, low=case.size / limit.high / 1e9,
        high=case.size / limit.low / 1e9, samples=limit.samples,
        bytes=case.size, environment=where, **_shape(case),
    )  # fmt: skip
