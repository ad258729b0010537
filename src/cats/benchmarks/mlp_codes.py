"""The gated MLP of ``cats bench mlp --bits``: its weights in codes, and what runs on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F_

from cats.benchmarks.mlp_case import Case, Weights
from cats.benchmarks.mlp_variants import Mlp
from cats.benchmarks.torch_int4 import TorchInt4Linear
from cats.errors import BackendError
from cats.ops.packed_mlp import PackedMLPArguments, packed_gated_mlp
from cats.ops.packed_mlp.backends import BACKENDS
from cats.ops.quantised import ColumnLayout, PackedColumns, PackedRows, RowLayout
from cats.quantisation import rounded
from cats.results import DENSE_MLPS as DENSE
from cats.results import TORCH_INT4
from cats.weights import Packed


@dataclass(frozen=True, slots=True)
class CodedWeights(Weights):
    """One MLP in codes; the matrices of :class:`Weights` hold the same numbers in 16 or 32 bits.

    Attributes:
        packed: Gate and up in packed rows, and down in packed columns.
        torch_int4: Gate, up and down for torch's own operator; None where it does not run.
    """

    packed: tuple[Packed, Packed, Packed]
    torch_int4: tuple[TorchInt4Linear, ...] | None

    @classmethod
    def random(cls, case: Case) -> CodedWeights:
        assert case.bits is not None
        dense = Weights.random(case)
        round_ = partial(rounded, bits=case.bits, group_size=case.group_size)
        codes = [round_(matrix) for matrix in (dense.gate, dense.up, dense.down_rows)]
        gate, up, down = (matrix.dequantised() for matrix in codes)
        merged, rows = torch.cat((gate, up)), len(gate)
        int4 = None
        if torch_int4_refusal(case) is None:
            int4 = tuple(TorchInt4Linear(matrix, None) for matrix in codes)
        return cls(
            gate=merged[:rows],
            up=merged[rows:],
            down=down.t().contiguous().t(),
            thresholds=dense.thresholds,
            merged=merged,
            down_rows=down,
            packed=(
                Packed.rows_of(codes[0], "gate"),
                Packed.rows_of(codes[1], "up"),
                Packed.columns_of(codes[2], "down"),
            ),
            torch_int4=int4,
        )

    def packed_arguments(self, x: Tensor) -> PackedMLPArguments:
        gate, up, down = (matrix.matrix for matrix in self.packed)
        assert isinstance(gate, PackedRows)
        assert isinstance(up, PackedRows)
        assert isinstance(down, PackedColumns)
        rows, columns = gate.layout, down.layout
        assert isinstance(rows, RowLayout)
        assert isinstance(columns, ColumnLayout)
        return PackedMLPArguments(
            *(x, gate.rows, up.rows, down.columns, down.scales, down.extras),
            *(self.thresholds, "silu", rows, columns, self.packed[0].arithmetic),
        )

    def bytes_read(self, name: str, share: float) -> float:
        if name in DENSE:
            # a name of its class, whose slots make it another one than super() would find
            return Weights.bytes_read(self, name, share)
        gate, up, down = (matrix.bytes for matrix in self.packed)
        return gate + share * (up + down)


def torch_int4_refusal(case: Case) -> str | None:
    """Why torch's own int4 operator does not run a case, or None."""
    if case.bits != 4:
        return "its weights have 4 bits"
    if case.dtype != torch.bfloat16 or not case.device.startswith("cuda"):
        return "it is timed in bfloat16 on a GPU"
    if case.hidden_size % 128 or case.intermediate_size % 128:
        return "its widths are multiples of 128"
    if case.group_size not in (32, 64, 128, 256):
        return "its groups have 32, 64, 128 or 256 columns"
    return None


def default_backends(x: Tensor, weights: CodedWeights) -> tuple[str, ...]:
    """The sparse backends that take this call.

    Raises:
        BackendError: If none takes it; the message has each reason.
    """
    names = ("cuda", "triton") if x.is_cuda else ("cpu",)
    arguments = weights.packed_arguments(x)
    reasons = {name: BACKENDS.why_refused(name, arguments) for name in names}
    takers = tuple(name for name, reason in reasons.items() if reason is None)
    if not takers:
        raise BackendError(
            f"no sparse backend takes this case on {x.device}: "
            + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        )
    return takers


def sparse_variants(backends: Sequence[str]) -> dict[str, Mlp]:
    """The backends of the operator over codes."""

    def backend(name: str) -> Mlp:
        def run(x: Tensor, weights: Weights) -> Tensor:
            assert isinstance(weights, CodedWeights)
            return packed_gated_mlp(weights.packed_arguments(x), name)

        return run

    if unknown := [name for name in backends if name not in BACKENDS.names]:
        raise BackendError(
            f"--backend {unknown[0]}: over codes it is one of {', '.join(BACKENDS.names)}"
        )
    return {name: backend(name) for name in backends}


def dense_variants(case: Case) -> dict[str, Mlp]:
    """Torch's own int4 operator, where it runs."""

    def torch_int4(x: Tensor, weights: Weights) -> Tensor:
        assert isinstance(weights, CodedWeights)
        assert weights.torch_int4 is not None
        gate, up, down = weights.torch_int4
        result: Tensor = down(F_.silu(gate(x)) * up(x))
        return result

    return {} if torch_int4_refusal(case) else {TORCH_INT4: torch_int4}
