"""Integer or float8 codes with scales: one meaning of the numbers for all formats of checkpoints.

A number of the matrix is ``(code - zero) * scale + shift``. Each row has one scale for each group
of consecutive columns. Codes stay in memory; the numbers are computed for one call at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from cats.errors import ShapeError
from cats.ops.quantised import numbers_of
from cats.weights.base import Order, Weight

FLOAT8 = torch.float8_e4m3fn
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


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
        # that module imports this one
        from cats.weights.quantised import QuantisedLinear

        stored = layer.stored if type(layer) is QuantisedLinear else None
        return stored if isinstance(stored, cls) else None

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
        numbers = numbers_of(
            self.codes,
            self.scales,
            bits=self.bits,
            columns=self.columns,
            group_size=self.group_size,
            zeros=self.zeros,
            zero=self.zero,
            shifts=self.shifts,
            arithmetic=self.arithmetic,
        )
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


def _check(
    layer: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ShapeError(f"{layer}: {name} is {described(tensor)}, expected {kinds} {list(shape)}")


def _check_below(layer: str, name: str, tensor: Tensor, limit: int) -> None:
    if not tensor.is_meta and tensor.numel() and int(tensor.max()) >= limit:
        raise ShapeError(f"{layer}: {name} go up to {int(tensor.max())}, expected below {limit}")


def described(tensor: Tensor) -> str:
    """Dtype and shape, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
