"""The matrices are written out, one at a time, and torch multiplies: for prompts and batches.

Computes what the unfused model computes: linear layers over the numbers of the checkpoint's format
in the dtype of ``x``, the activation and the comparison in float32.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cats.ops.mlp.dense import product
from cats.ops.packed_linear.dense import dequantised as dequantised_rows
from cats.ops.packed_linear.dense import has_kernel
from cats.ops.packed_mlp import cpu
from cats.ops.packed_mlp.arguments import PackedMLPArguments
from cats.ops.quantised import PackedColumns, numbers_of_columns


def packed_gated_mlp(arguments: PackedMLPArguments) -> Tensor:
    """See :func:`cats.ops.packed_mlp.packed_gated_mlp`."""
    a, dtype = arguments, arguments.x.dtype
    g = F.linear(a.x, dequantised_rows(a.gate, a.rows, a.arithmetic, dtype), a.gate_bias)
    u = F.linear(a.x, dequantised_rows(a.up, a.rows, a.arithmetic, dtype), a.up_bias)
    h = product(g, u, a.thresholds, a.activation, a.router, a.product_thresholds)
    return F.linear(h, dequantised(a.packed_down, a.arithmetic, dtype), a.down_bias)


def dequantised(columns: PackedColumns, arithmetic: torch.dtype, dtype: torch.dtype) -> Tensor:
    """The numbers of packed columns, ``[D, F]`` in ``dtype``: by one kernel where there is one."""
    if has_kernel(columns.columns, arithmetic):
        from cats.ops.packed_mlp.triton import dequantise_columns

        return dequantise_columns(columns, arithmetic, dtype)
    if cpu.writes_out(columns.columns, arithmetic, dtype):
        return cpu.dequantise_columns(columns, dtype)
    return numbers_of_columns(columns, arithmetic, dtype)


def unavailable() -> str | None:
    """None: it runs wherever PyTorch does."""
    return None


def refuses(arguments: PackedMLPArguments) -> str | None:
    """None: it takes every call."""
    return None
