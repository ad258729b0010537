"""Integer or float8 codes with scales: one meaning of the numbers for all formats of checkpoints.

A number of the matrix is ``(code - zero) * scale + shift``. Each row has one scale for each group
of consecutive columns. Codes stay in memory; the numbers are computed for one call at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cats.errors import ShapeError
from cats.weights.base import Order, Weight

FLOAT8 = torch.float8_e4m3fn
_SCALES = (torch.float16, torch.bfloat16, torch.float32)
# An integer of the same size: module.to(dtype) converts floating-point tensors only.
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class Quantised(Weight):
    """A matrix ``[rows, columns]`` in codes of 4 or 8 bits.

    Attributes:
        codes: uint8. Of 8 bits, ``[rows, columns]``; of 4 bits, ``[rows, ceil(columns / 2)]`` with
            the even column in the low four bits. float8_e4m3fn ``[rows, columns]`` where the
            codes are such numbers.
        scales: ``[rows, G]``, float16, bfloat16 or float32, for ``G = ceil(columns / group_size)``
            groups.
        bits: 4 or 8.
        columns: Of the matrix.
        group_size: Columns of a group; ``columns`` where a row has one scale.
        zeros: ``[rows, G]``, uint8; None where all are ``zero``.
        zero: The code of the number 0 where there are no zeros: 8 and 128 of signed integers.
        shifts: ``[rows, G]`` in the dtype of scales, added to the product; None for none.
        column_order: ``[columns]``, int64. The stored column ``j`` is the column
            ``column_order[j]`` of the matrix; None where the order is the same.
        arithmetic: The dtype that the format's own library computes in.
        dtype: Of the result.
    """

    storage = "quantised"

    codes: Tensor
    scales: Tensor
    bits: int
    columns: int
    group_size: int
    zeros: Tensor | None = None
    zero: int = 0
    shifts: Tensor | None = None
    column_order: Tensor | None = None
    arithmetic: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, layer: nn.Module) -> Self | None:
        if type(layer) is not QuantisedLinear:
            return None
        weight = layer.matrix
        assert isinstance(weight, cls)
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), self.columns

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        stored = (self.codes, self.scales, self.zeros, self.shifts, self.column_order)
        return tuple(tensor for tensor in stored if tensor is not None)

    @property
    def order(self) -> Order | None:
        return "rows"

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return -(-self.columns // self.group_size)

    @property
    def kind(self) -> str:
        """What a code is: ``int4``, ``int8`` or ``float8``."""
        return "float8" if self.codes.dtype == FLOAT8 else f"int{self.bits}"

    @property
    def scaling(self) -> str:
        """What shares a scale, in words."""
        return "a scale per row" if self.groups == 1 else f"groups of {self.group_size}"

    def dequantised(self) -> Tensor:
        # in place: one temporary matrix instead of four
        numbers = unpacked(self.codes, self.bits, self.columns).to(self.arithmetic)
        if self.zeros is None and self.zero:
            numbers.sub_(self.zero)
        whole = self.columns // self.group_size
        end = whole * self.group_size
        # the last group may be shorter
        parts = [(numbers[:, :end].unflatten(1, (whole, self.group_size)), slice(whole))]
        if end < self.columns:
            parts.append((numbers[:, end:].unsqueeze(1), slice(whole, None)))
        for part, groups in parts:
            if self.zeros is not None:
                part.sub_(self.zeros[:, groups, None].to(self.arithmetic))
            part.mul_(self.scales[:, groups, None].to(self.arithmetic))
            if self.shifts is not None:
                part.add_(self.shifts[:, groups, None].to(self.arithmetic))
        if self.column_order is not None:
            numbers = torch.empty_like(numbers).index_copy_(1, self.column_order, numbers)
        return numbers.to(self.dtype)

    def part(self, start: int, stop: int) -> Self:
        zeros, shifts = (None if t is None else t[start:stop] for t in (self.zeros, self.shifts))
        return replace(
            self,
            codes=self.codes[start:stop],
            scales=self.scales[start:stop],
            zeros=zeros,
            shifts=shifts,
        )

    def rows(self, order: Tensor) -> Self:
        """The rows of these numbers, copied, in this order."""
        zeros, shifts = (None if t is None else t[order] for t in (self.zeros, self.shifts))
        return replace(
            self, codes=self.codes[order], scales=self.scales[order], zeros=zeros, shifts=shifts
        )

    def check(self, name: str) -> None:
        """
        Args:
            name: Of the layer, for messages.

        Raises:
            ShapeError: If a tensor does not have the shape, dtype or range that the others imply.
                Ranges are not looked at on ``meta``.
        """
        if self.bits not in (4, 8):
            raise ShapeError(f"{name}: codes of {self.bits} bits, expected 4 or 8")
        if self.columns < 1 or self.group_size < 1:
            raise ShapeError(
                f"{name}: {self.columns} columns in groups of {self.group_size}, expected at "
                "least one"
            )
        is_float = self.codes.dtype == FLOAT8
        if is_float and (self.bits != 8 or self.zero or self.zeros is not None):
            raise ShapeError(f"{name}: float8 codes have 8 bits and no zero point")
        rows = self.codes.shape[0] if self.codes.ndim else 0
        width = self.columns if self.bits == 8 else -(-self.columns // 2)
        of_groups = (rows, self.groups)
        _check(name, "codes", self.codes, (rows, width), (FLOAT8,) if is_float else (torch.uint8,))
        _check(name, "scales", self.scales, of_groups, _SCALES)
        if not 0 <= self.zero < 2**self.bits:
            raise ShapeError(f"{name}: the zero point is {self.zero}, which no code is")
        if self.zeros is not None:
            _check(name, "zeros", self.zeros, of_groups, (torch.uint8,))
            _check_below(name, "zeros", self.zeros, 2**self.bits)
        if self.shifts is not None:
            _check(name, "shifts", self.shifts, of_groups, (self.scales.dtype,))
        if (order := self.column_order) is not None:
            _check(name, "column_order", order, (self.columns,), (torch.int64,))
            if not order.is_meta and not torch.equal(
                order.sort().values, torch.arange(self.columns, device=order.device)
            ):
                raise ShapeError(f"{name}: column_order does not name each column once")
        if len(devices := sorted({str(tensor.device) for tensor in self.tensors})) > 1:
            raise ShapeError(f"{name}: its tensors are on {' and '.join(devices)}")

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"<{self.kind} weight [{rows}, {columns}], {self.scaling}>"


class QuantisedLinear(nn.Module):
    """A linear layer over :class:`Quantised` numbers, which no optimiser changes.

    The matrix exists during a call only. A backward pass computes it again, so that training
    adapters on many such layers does not keep them all.

    Attributes:
        in_features: Columns of the matrix.
        out_features: Its rows.
        dtype: Of the numbers. ``module.to(dtype)`` changes it, and leaves codes and scales alone.
        bias: ``[out_features]``, or None.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    shifts: Tensor | None
    column_order: Tensor | None

    def __init__(
        self, weight: Quantised, bias: Tensor | None = None, *, name: str = "the layer"
    ) -> None:
        """
        Args:
            weight: The numbers; the module takes its tensors, without a copy.
            bias: ``[rows]``, floating-point.
            name: What messages call the layer.

        Raises:
            ShapeError: As for :meth:`Quantised.check`, or for a bias of another shape.
        """
        super().__init__()
        weight.check(name)
        if bias is not None and (
            bias.shape != weight.shape[:1] or not bias.dtype.is_floating_point
        ):
            raise ShapeError(
                f"{name}: its bias is {_described(bias)}, expected a floating-point "
                f"[{weight.shape[0]}]"
            )
        self.out_features, self.in_features = weight.shape
        self.bits, self.group_size, self.zero = weight.bits, weight.group_size, weight.zero
        self.arithmetic, self.dtype = weight.arithmetic, weight.dtype
        for buffer in ("codes", "scales", "zeros", "shifts", "column_order"):
            self.register_buffer(buffer, getattr(weight, buffer))
        self.bias = None if bias is None else nn.Parameter(bias.detach())

    @property
    def matrix(self) -> Quantised:
        return Quantised(
            codes=self.codes,
            scales=self.scales,
            bits=self.bits,
            columns=self.in_features,
            group_size=self.group_size,
            zeros=self.zeros,
            zero=self.zero,
            shifts=self.shifts,
            column_order=self.column_order,
            arithmetic=self.arithmetic,
            dtype=self.dtype,
        )

    @property
    def qweight(self) -> Tensor:
        """What PEFT takes the device of adapters from."""
        return self.codes

    @property
    def compute_dtype(self) -> torch.dtype:
        """What PEFT takes the dtype of adapters from."""
        return self.dtype

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            product: Any = _Product
            result: Tensor = product.apply(x, self.bias, self.matrix)
            return result
        return nn.functional.linear(x, self.matrix.dequantised(), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        stored = {
            name: tensor
            for name, tensor in self._buffers.items()
            if tensor is not None and tensor.is_floating_point()
        }
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        try:
            for name, tensor in stored.items():
                self._buffers[name] = tensor.view(_SAME_SIZE[tensor.itemsize])
            apply: Any = super()._apply
            return cast(Self, apply(fn, recurse))
        finally:
            for name, tensor in stored.items():
                moved = self._buffers[name]
                assert moved is not None
                self._buffers[name] = moved.view(tensor.dtype)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.matrix!r}, bias={bias}, dtype={self.dtype}"


def is_quantised(model: nn.Module) -> bool:
    """Whether a layer of the model holds codes."""
    return any(isinstance(module, QuantisedLinear) for module in model.modules())


class _Product(Function):
    """``x @ matrix.T + bias``, whose backward pass computes the matrix again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, matrix: Quantised) -> Tensor:
        ctx.matrix, ctx.dtype, ctx.bias_dtype = (
            matrix,
            x.dtype,
            None if bias is None else bias.dtype,
        )
        return nn.functional.linear(x, matrix.dequantised(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            # under autocast the product has another dtype than the numbers
            grad_x = (grad @ ctx.matrix.dequantised().to(grad.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
        return grad_x, grad_bias, None


def packed(codes: Tensor) -> Tensor:
    """Codes of 4 bits, two in a byte: ``[rows, columns]`` to ``[rows, ceil(columns / 2)]``."""
    if codes.shape[1] % 2:
        codes = nn.functional.pad(codes, (0, 1))
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpacked(codes: Tensor, bits: int, columns: int) -> Tensor:
    """Codes, one in each number: ``[rows, columns]``."""
    if bits == 8:
        return codes
    return torch.stack((codes & 15, codes >> 4), 2).flatten(1)[:, :columns]


def _check(
    layer: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ShapeError(f"{layer}: {name} is {_described(tensor)}, expected {kinds} {list(shape)}")


def _check_below(layer: str, name: str, tensor: Tensor, limit: int) -> None:
    if not tensor.is_meta and tensor.numel() and int(tensor.max()) >= limit:
        raise ShapeError(f"{layer}: {name} go up to {int(tensor.max())}, expected below {limit}")


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
