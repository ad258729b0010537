"""The CPU backend of ``cats::packed_linear``: C++, for 1 to 8 tokens."""

import torch
from torch import Tensor

from cats.ops.cpu import MAX_BATCH, unavailable
from cats.ops.packed_linear.arguments import PackedLinearArguments

__all__ = ["packed_linear", "refuses", "refuses_x", "unavailable"]


def packed_linear(arguments: PackedLinearArguments) -> Tensor:
    """See :func:`cats.ops.packed_linear.packed_linear`."""
    a = arguments
    out: Tensor = _OPERATOR(a.x, a.rows, a.bias, *a.layout.numbers)
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
# nothing to record: cats::packed_linear handles gradients
_LIBRARY.impl("_packed_linear_cpu", torch.library.fallthrough_kernel, "Autograd")

_OPERATOR = torch.ops.cats._packed_linear_cpu.default
