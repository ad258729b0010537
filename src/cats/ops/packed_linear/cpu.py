"""The CPU backend of ``cats::packed_linear``: C++, for 1 to 8 tokens."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from cats.ops.cpu import MAX_BATCH, unavailable
from cats.ops.packed_linear.arguments import PackedLinearArguments
from cats.ops.quantised import SCALE_CODES, RowLayout

__all__ = ["dequantise_rows", "packed_linear", "refuses", "refuses_x", "unavailable", "writes_out"]


def packed_linear(arguments: PackedLinearArguments) -> Tensor:
    """See :func:`cats.ops.packed_linear.packed_linear`."""
    a = arguments
    out: Tensor = _OPERATOR(a.x, a.rows, a.bias, *a.layout.numbers)
    return out


def writes_out(packed: Tensor, arithmetic: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether C++ writes these numbers out, in one pass; a trace holds torch's operators."""
    return (
        packed.device.type == "cpu"
        and arithmetic == torch.float32
        and dtype in SCALE_CODES
        and len(packed) > 0
        and unavailable() is None
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
    )


def dequantise_rows(rows: Tensor, layout: RowLayout, dtype: torch.dtype) -> Tensor:
    """The numbers of packed rows, computed in float32: bit for bit those of torch's operators.

    Args:
        rows: ``[N, layout.pitch]``, uint8, contiguous, on a CPU.
        layout: How a row is packed.
        dtype: Of the result: float32, bfloat16 or float16.
    """
    out: Tensor = _WRITE_ROWS(rows, *layout.numbers, SCALE_CODES[dtype])
    return out


def refuses(arguments: PackedLinearArguments) -> str | None:
    """Why a call is left to ``dense``, or None."""
    if len(arguments.rows) == 0:
        return "expected at least one row"
    return refuses_x(arguments.x)


def refuses_x(x: Tensor) -> str | None:
    """Why no kernel takes these tokens, or None."""
    if x.device.type != "cpu":
        return f"expected CPU tensors, got {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"expected float32, bfloat16 or float16, got {x.dtype}"
    if not 1 <= x.shape[0] <= MAX_BATCH:
        return f"expected 1 to {MAX_BATCH} tokens, got {x.shape[0]}"
    return None


_LIBRARY = torch.library.Library("cats", "FRAGMENT")
# packed_linear.cpp registers its kernel; the layout is the numbers of RowLayout
_LIBRARY.define(
    "_packed_linear_cpu(Tensor x, Tensor rows, Tensor? bias, int bits, int columns, "
    "int group_size, int scale, int zero_mode, int zero) -> Tensor"
)
_LIBRARY.define(
    "_dequantise_rows_cpu(Tensor rows, int bits, int columns, int group_size, int scale, "
    "int zero_mode, int zero, int dtype) -> Tensor"
)
# nothing to record: cats::packed_linear handles gradients
_LIBRARY.impl("_packed_linear_cpu", torch.library.fallthrough_kernel, "Autograd")

_LIBRARY.impl("_dequantise_rows_cpu", torch.library.fallthrough_kernel, "Autograd")

_OPERATOR = torch.ops.cats._packed_linear_cpu.default
_WRITE_ROWS = torch.ops.cats._dequantise_rows_cpu.default
