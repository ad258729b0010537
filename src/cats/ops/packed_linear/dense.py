"""The matrix is written out, and torch multiplies: for many tokens, and where no kernel runs.

Computes what a linear layer over the numbers of the checkpoint's format computes, bit for bit.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cats.ops.packed_linear import cpu
from cats.ops.packed_linear.arguments import PackedLinearArguments
from cats.ops.packed_linear.backends import BACKENDS
from cats.ops.quantised import RowLayout, numbers_of_rows
from cats.ops.watching import may_launch


def packed_linear(arguments: PackedLinearArguments) -> Tensor:
    """See :func:`cats.ops.packed_linear.packed_linear`."""
    a = arguments
    return F.linear(a.x, dequantised(a.rows, a.layout, a.arithmetic, a.x.dtype), a.bias)


def dequantised(
    rows: Tensor, layout: RowLayout, arithmetic: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """The numbers of packed rows, ``[N, columns]`` in ``dtype``: by a kernel where there is one."""
    if has_kernel(rows, arithmetic):
        from cats.ops.packed_linear.triton import dequantise_rows

        return dequantise_rows(rows, layout, arithmetic, dtype)
    if cpu.writes_out(rows, arithmetic, dtype):
        return cpu.dequantise_rows(rows.contiguous(), layout, dtype)
    return numbers_of_rows(rows, layout, arithmetic, dtype)


def has_kernel(packed: Tensor, arithmetic: torch.dtype) -> bool:
    """Whether Triton writes a packed matrix out; torch does so in any other arithmetic."""
    known = arithmetic in (torch.bfloat16, torch.float16, torch.float32)
    return known and may_launch(packed) and BACKENDS.why_unavailable("triton") is None


def unavailable() -> str | None:
    """None: it runs wherever PyTorch does."""
    return None


def refuses(arguments: PackedLinearArguments) -> str | None:
    """None: it takes every call."""
    return None
