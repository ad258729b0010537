"""Portable GPU backend: Triton kernels read packed rows and columns of kept neurons alone.

One launch computes the products of both branches, a second one the sums over the columns of kept
neurons, and a third adds these. Deterministic: which program takes which neurons is fixed, and sums
are added in a fixed order.
"""

import torch
from torch import Tensor

from cats.ops.packed_linear.triton import refuses_rows
from cats.ops.packed_linear.triton import unavailable as linear_unavailable
from cats.ops.packed_mlp.arguments import PackedMLPArguments
from cats.ops.quantised import PackedColumns


def unavailable() -> str | None:
    """Why it cannot run on this machine, or None. Triton's interpreter runs it on a CPU."""
    return linear_unavailable()


def refuses(arguments: PackedMLPArguments) -> str | None:
    """Why it leaves this call to another backend, or None."""
    return refuses_rows(arguments.x, arguments.gate, arguments.rows, arguments.arithmetic)


def packed_gated_mlp(arguments: PackedMLPArguments) -> Tensor:
    """See :func:`cats.ops.packed_mlp.packed_gated_mlp`. No synchronisation with the host."""
    from cats.ops.packed_mlp.triton import launch

    return launch.packed_gated_mlp(arguments)


def dequantise_columns(
    packed: PackedColumns, arithmetic: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """The numbers of packed columns, ``[D, F]`` in ``dtype``, bit for bit those of the format.

    Args:
        packed: On a GPU.
        arithmetic: What each operation rounds to: bfloat16, float16 or float32.
        dtype: Of the result, any floating-point one.
    """
    from cats.ops.packed_mlp.triton import launch

    return launch.dequantise_columns(packed, arithmetic, dtype)
