"""The MLPs that ``cats bench mlp`` times: backends, dense baselines, and the paper's kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F_

from cats import ops
from cats.benchmarks.mlp_case import Case, Weights
from cats.errors import BackendError
from cats.ops.mlp import reference
from cats.ops.mlp.backends import why_refused
from cats.results import DENSE_MLPS as DENSE
from cats.results import PAPER_MLP as PAPER
from cats.results import TORCH_INT4

# Largest accepted norm of the error over the norm of the output, against float64.
ERROR_LIMIT = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}
# Dense baselines round gate, up and their product as well.
DENSE_ERROR_LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

Mlp = Callable[[Tensor, Weights], Tensor]


def check(name: str, mlp: Mlp, x: Tensor, weights: Weights) -> None:
    """Raise BackendError unless ``mlp`` agrees with the definition in float64."""
    w = weights
    exact = reference.gated_mlp(
        ops.GatedMLPArguments(
            x.double(), w.gate.double(), w.up.double(), w.down.double(), w.thresholds, "silu"
        )
    )
    error = ((mlp(x, weights).double() - exact).norm() / exact.norm()).item()
    rounds_more = name in (*DENSE, TORCH_INT4, "dense")
    limit = (DENSE_ERROR_LIMIT if rounds_more else ERROR_LIMIT)[x.dtype]
    # written so that NaN fails
    if not error <= limit:
        raise BackendError(
            f"{name} is wrong for {list(weights.gate.shape)} {x.dtype}, batch {len(x)}: relative "
            f"error {error:.1e}, at most {limit:.1e} is rounding; it is not timed"
        )


def default_backends(x: Tensor, weights: Weights) -> tuple[str, ...]:
    """The sparse backends that take this call, and for one token on a GPU the paper's kernels.

    Raises:
        BackendError: If no backend takes it; the message has each reason.
    """
    names = ("cuda", "triton") if x.is_cuda else ("cpu",)
    reasons = {name: why_refused(name, weights.arguments(x)) for name in names}
    takers = tuple(name for name, reason in reasons.items() if reason is None)
    if not takers:
        raise BackendError(
            f"no sparse backend takes this case on {x.device}: "
            + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        )
    return (*takers, PAPER) if "triton" in takers and len(x) == 1 else takers


def sparse_variants(case: Case, backends: Sequence[str]) -> dict[str, Mlp]:
    """The backends of the operator, and the paper's kernels if they are among them."""

    def backend(name: str) -> Mlp:
        return lambda x, w: ops.gated_mlp(
            x, w.gate, w.up, w.down, w.thresholds, "silu", backend=name
        )

    variants = {name: backend(name) for name in backends if name != PAPER}
    if PAPER in backends:
        if case.batch != 1:
            raise BackendError("the paper's kernels take one token")
        variants[PAPER] = paper
    return variants


def paper(x: Tensor, w: Weights) -> Tensor:
    """The design of the paper's kernels, for one token."""
    # imported on first use: Triton is optional
    from cats.benchmarks import paper_kernels

    return paper_kernels.gated_mlp(x, w.gate, w.up, w.down, w.thresholds)


def dense_variants(case: Case) -> dict[str, Mlp]:
    """The dense baselines, by their names in the results."""

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
