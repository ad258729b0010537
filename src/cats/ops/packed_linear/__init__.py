"""The operator ``cats::packed_linear``: a linear layer over packed rows of codes.

``arguments.py`` checks the arguments of a call, and ``backends.py`` chooses its backend.
``dense.py`` defines the result, ``cpu`` and ``triton`` are faster.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cats.errors import ShapeError
from cats.ops.packed_linear.arguments import PackedLinearArguments
from cats.ops.packed_linear.backends import BACKENDS
from cats.ops.packed_linear.dense import dequantised
from cats.ops.quantised import RowLayout

__all__ = ["PackedLinearArguments", "call", "packed_linear"]


def packed_linear(
    x: Tensor,
    rows: Tensor,
    bias: Tensor | None = None,
    *,
    layout: RowLayout,
    arithmetic: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """``x @ numbers(rows).T + bias``.

    Args:
        x: ``[B, columns]``; bfloat16, float16 or float32.
        rows: ``[N, layout.pitch]``, uint8, as :func:`cats.ops.quantised.pack_rows` gives them.
        bias: ``[N]`` in the dtype of ``x``.
        layout: How a row is packed.
        arithmetic: The dtype in which the format of the checkpoint makes numbers of codes.
        backend: ``"auto"``, or one of ``dense``, ``cpu`` and ``triton``.

    Returns:
        ``[B, N]`` in the dtype of ``x``. It has gradients of ``x`` and ``bias``.

    Raises:
        ShapeError: If a shape, dtype or layout does not fit.
        BackendError: If ``backend`` is named and cannot run this call.
    """
    return call(PackedLinearArguments(x, rows, bias, layout, arithmetic), backend)


def call(arguments: PackedLinearArguments, backend: str = "auto") -> Tensor:
    """:func:`packed_linear` of arguments in one object."""
    x, rows, bias, layout, arithmetic = arguments
    operands = x, rows, bias, layout.numbers, arithmetic, backend
    bias_has_gradient = bias is not None and bias.requires_grad
    if torch.is_grad_enabled() and (x.requires_grad or bias_has_gradient):
        product: Any = _Product
        result: Tensor = product.apply(*operands)
        return result
    out: Tensor = _OPERATOR(*operands)
    return out


def _packed_linear(
    x: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    layout: list[int],
    arithmetic: torch.dtype,
    backend: str = "auto",
) -> Tensor:
    arguments = PackedLinearArguments(x, rows, bias, RowLayout.of(layout), arithmetic)
    return BACKENDS.checked(arguments, backend)(arguments)


_LIBRARY = torch.library.Library("cats", "FRAGMENT")
_LIBRARY.define(
    "packed_linear(Tensor x, Tensor rows, Tensor? bias, int[] layout, ScalarType arithmetic, "
    "str backend='auto') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("packed_linear", _packed_linear, "CompositeExplicitAutograd")
# nothing to record: `call` handles gradients
_LIBRARY.impl("packed_linear", torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("cats::packed_linear", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(x: Tensor, rows: Tensor, *args: object, **kwargs: object) -> Tensor:
    # torch calls this as well where only the weights are on meta
    if rows.device != x.device:
        raise ShapeError(f"expected rows on {x.device}, got {rows.device}: are weights offloaded?")
    return x.new_empty(x.shape[0], rows.shape[0])


_OPERATOR = torch.ops.cats.packed_linear.default


class _Product(Function):
    """The operator, whose backward pass writes the matrix out again instead of keeping it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor,
        bias: Tensor | None,
        layout: tuple[int, ...],
        arithmetic: torch.dtype,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.layout, ctx.arithmetic = layout, arithmetic
        out: Tensor = _OPERATOR(x, rows, bias, layout, arithmetic, backend)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            (rows,) = ctx.saved_tensors
            layout = RowLayout.of(ctx.layout)
            grad_x = grad @ dequantised(rows, layout, ctx.arithmetic, grad.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_x, None, grad_bias, None, None, None
