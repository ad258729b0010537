"""One gated MLP that ``cats bench mlp`` times: its shape and its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F_

from cats import ops
from cats.errors import ConfigError
from cats.functional import keep_mask


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is timed: ``[batch, D]`` through ``[F, D]`` at several sparsities.

    Attributes:
        backends: Backends of the operator, or the paper's kernels; by default those that take it.
        rounds: Number of timed passes.
        size: Bytes of the read that gives the memory limit.
        compiled: Whether torch.compile's dense MLP is timed, which is slow to build.
        bits: Of weights in codes, rounded to nearest: 4 or 8; None for weights in the dtype.
        group_size: Columns that share a scale; None for a scale per row.
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
    bits: int | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        if min(self.hidden_size, self.intermediate_size, self.batch) < 1:
            raise ConfigError("shape and batch must be positive")
        if not all(0 <= s < 1 for s in self.sparsities):
            raise ConfigError(f"sparsities must lie in [0, 1), got {list(self.sparsities)}")
        if self.rounds < 2:
            raise ConfigError(f"rounds must be at least 2, got {self.rounds}")
        if self.bits not in (None, 4, 8):
            raise ConfigError(f"bits must be 4 or 8, got {self.bits}")
        widths = (self.hidden_size, self.intermediate_size)
        if self.group_size is not None and any(width % self.group_size for width in widths):
            raise ConfigError(
                f"{widths[0]}x{widths[1]} has no whole groups of {self.group_size} columns: choose "
                "another --group, or -1 for a scale per row"
            )


@dataclass(frozen=True, slots=True)
class Weights:
    """One MLP, each matrix in the layout that the operator reads, with its thresholds.

    Attributes:
        merged: Gate and up in one matrix, as some dense models hold them.
        down_rows: Down in row-major layout, as dense models hold it.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    thresholds: Tensor
    merged: Tensor
    down_rows: Tensor

    @classmethod
    def random(cls, case: Case) -> Weights:
        D, F = case.hidden_size, case.intermediate_size

        def normal(*shape: int, scale: float) -> Tensor:
            return torch.randn(shape, device=case.device, dtype=case.dtype).mul_(scale)

        merged = normal(2 * F, D, scale=D**-0.5)
        down = normal(F, D, scale=(0.36 * F) ** -0.5).t()
        thresholds = torch.zeros(F, device=case.device)
        return cls(merged[:F], merged[F:], down, thresholds, merged, down.contiguous())

    def at(self, x: Tensor, sparsity: float) -> Weights:
        """The same weights with a threshold that drops this share of the gates of ``x``."""
        gates = activated_gates(x, self).abs()
        threshold = _between(gates.flatten().sort().values, sparsity) if sparsity else 0.0
        return replace(self, thresholds=torch.full_like(self.thresholds, threshold))

    def arguments(self, x: Tensor) -> ops.GatedMLPArguments:
        return ops.GatedMLPArguments(x, self.gate, self.up, self.down, self.thresholds, "silu")

    def bytes_read(self, name: str, share: float) -> float:
        """Bytes that a variant must read.

        Args:
            name: Of the variant.
            share: Share of the neurons whose rows of up and columns of down are read.
        """
        return (1 + 2 * share) * self.gate.nbytes

    def kept_share(self, x: Tensor) -> float:
        """Share of neurons that at least one token keeps."""
        kept = keep_mask(activated_gates(x, self), self.thresholds).any(0)
        return kept.double().mean().item()


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
