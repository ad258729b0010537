"""The CPU backend of ``cats::packed_gated_mlp``: C++, for 1 to 8 tokens."""

import torch
from torch import Tensor

from cats.ops.cpu import unavailable
from cats.ops.packed_linear.cpu import refuses_x, writes_out
from cats.ops.packed_mlp.arguments import PackedMLPArguments
from cats.ops.quantised import SCALE_CODES, PackedColumns

__all__ = [
    "dequantise_columns",
    "operands",
    "packed_gated_mlp",
    "refuses",
    "unavailable",
    "writes_out",
]

# As `Activation` of mlp/cpu/gated_mlp.h numbers them.
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}


def packed_gated_mlp(arguments: PackedMLPArguments) -> Tensor:
    """See :func:`cats.ops.packed_mlp.packed_gated_mlp`."""
    out: Tensor = _OPERATOR(*operands(arguments))
    return out


def operands(arguments: PackedMLPArguments) -> tuple[Tensor | int | None, ...]:
    """The arguments of the C++ operator."""
    a = arguments
    return (
        *a[:7],
        _ACTIVATIONS[a.activation],
        a.router == "gate",
        a.gate_bias,
        a.up_bias,
        a.down_bias,
        a.product_thresholds,
        *a.rows.numbers,
        *a.columns.numbers,
    )


def dequantise_columns(packed: PackedColumns, dtype: torch.dtype) -> Tensor:
    """The numbers of packed columns ``[D, F]``, computed in float32: bit for bit those of torch.

    Args:
        packed: On a CPU.
        dtype: Of the result: float32, bfloat16 or float16.
    """
    tensors = packed.columns.contiguous(), packed.scales, packed.extras
    out: Tensor = _WRITE_COLUMNS(*tensors, *packed.layout.numbers, SCALE_CODES[dtype])
    return out


def refuses(arguments: PackedMLPArguments) -> str | None:
    """Why a call is left to ``dense``, or None."""
    if len(arguments.gate) == 0:
        return "expected at least one neuron"
    if arguments.activation not in _ACTIVATIONS:
        return f"expected one of {', '.join(_ACTIVATIONS)}, got {arguments.activation!r}"
    return refuses_x(arguments.x)


_LIBRARY = torch.library.Library("cats", "FRAGMENT")
# packed_mlp.cpp registers its kernel; the layouts are the numbers of RowLayout and ColumnLayout
_LIBRARY.define(
    "_packed_gated_mlp_cpu(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor down_scales, "
    "Tensor? down_extras, Tensor thresholds, int activation, bool gate_is_router, "
    "Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, Tensor? product_thresholds, "
    "int row_bits, int row_columns, int row_group_size, int row_scale, int row_zero_mode, "
    "int row_zero, int column_bits, int outputs, int column_group_size, int column_scale, "
    "int column_zero_mode, int column_zero) -> Tensor"
)
_LIBRARY.define(
    "_dequantise_columns_cpu(Tensor columns, Tensor scales, Tensor? extras, int bits, int outputs, "
    "int group_size, int scale, int zero_mode, int zero, int dtype) -> Tensor"
)
# nothing to record: codes have no gradient, and the MLP handles that of x above
_LIBRARY.impl("_dequantise_columns_cpu", torch.library.fallthrough_kernel, "Autograd")
_LIBRARY.impl("_packed_gated_mlp_cpu", torch.library.fallthrough_kernel, "Autograd")

_OPERATOR = torch.ops.cats._packed_gated_mlp_cpu.default
_WRITE_COLUMNS = torch.ops.cats._dequantise_columns_cpu.default
