"""Columns of a quantised ``down`` as CUDA kernels stream them (``quantised_down.cuh``).

A packed column is a neuron: one code per output, in order; with 4 bits, two codes in a byte. Groups
of neurons share scales, so these are a table of their own, with one row of outputs per group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from cats.errors import ShapeError, UnsupportedModelError
from cats.ops.quantised.codes import (
    SCALE_CODES,
    SCALE_DTYPES,
    ZeroMode,
    check_codes,
    check_given,
)

__all__ = ["ColumnLayout", "PackedColumns", "pack_columns", "unpack_columns"]

_SET = 128  # outputs that a warp works on at once


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnLayout:
    """How the columns of a matrix are packed.

    Attributes:
        bits: Of a code, 4 or 8.
        outputs: Rows of the matrix.
        group_size: Consecutive neurons that share a scale per output; 0 where all do.
        scale_dtype: float16, bfloat16 or float32.
        zero_mode: What there is besides codes and scales.
        zero: The constant zero point; 0 with :attr:`ZeroMode.ZEROS`.
    """

    bits: int
    outputs: int
    group_size: int
    scale_dtype: torch.dtype
    zero_mode: ZeroMode = ZeroMode.CONSTANT
    zero: int = 0

    def __post_init__(self) -> None:
        check_codes(self, "columns that have zero points have no constant one")
        if self.outputs % 4 or self.outputs < 1:
            raise UnsupportedModelError(f"outputs must be a multiple of 4, got {self.outputs}")
        if self.group_size < 0:
            raise ShapeError(f"a group must have neurons, got {self.group_size}")

    @staticmethod
    def of(numbers: Sequence[int]) -> "ColumnLayout":
        """The layout that :attr:`numbers` stand for."""
        return _layout(tuple(numbers))

    @property
    def numbers(self) -> tuple[int, ...]:
        """The layout as an operator of torch takes it."""
        scale, mode = SCALE_CODES[self.scale_dtype], int(self.zero_mode)
        return self.bits, self.outputs, self.group_size, scale, mode, self.zero

    @property
    def pitch(self) -> int:
        """Bytes from one packed column to the next: an odd multiple of 32, for the banks."""
        used = -(-self.outputs // _SET) * _SET * self.bits // 8
        return used + 32 * (used % 64 == 0)

    def groups_of(self, neurons: int) -> int:
        """How many groups so many neurons make."""
        return -(-neurons // self.group_size) if self.group_size else 1


# cached, since an operator asks at each call
@cache
def _layout(numbers: tuple[int, ...]) -> ColumnLayout:
    bits, outputs, group_size, scale, mode, zero = numbers
    return ColumnLayout(
        bits=bits,
        outputs=outputs,
        group_size=group_size,
        scale_dtype=SCALE_DTYPES[scale],
        zero_mode=ZeroMode(mode),
        zero=zero,
    )


@dataclass(frozen=True, slots=True)
class PackedColumns:
    """A packed ``down``.

    Attributes:
        columns: ``[neurons, pitch]``, uint8.
        scales: ``[groups, outputs]``.
        extras: The same shape: zero points (uint8), shifts (in the dtype of the scales), or None.
        layout: How the columns are packed.
    """

    columns: Tensor
    scales: Tensor
    extras: Tensor | None
    layout: ColumnLayout

    def __post_init__(self) -> None:
        layout = self.layout
        expected = len(self.columns), layout.pitch
        if tuple(self.columns.shape) != expected or self.columns.dtype != torch.uint8:
            raise ShapeError(
                f"packed columns must be {list(expected)} of uint8, "
                f"got {list(self.columns.shape)} of {self.columns.dtype}"
            )
        tables = layout.groups_of(len(self.columns)), layout.outputs
        extra_dtype = {
            ZeroMode.CONSTANT: None,
            ZeroMode.ZEROS: torch.uint8,
            ZeroMode.SHIFTS: layout.scale_dtype,
        }[layout.zero_mode]
        for name, table, dtype in (
            ("scales", self.scales, layout.scale_dtype),
            ("zeros or shifts", self.extras, extra_dtype),
        ):
            found = None if table is None else (tuple(table.shape), table.dtype)
            wanted = None if dtype is None else (tables, dtype)
            if found != wanted:
                raise ShapeError(f"{name} must be {wanted}, got {found}")


def pack_columns(
    layout: ColumnLayout,
    codes: Tensor,
    scales: Tensor,
    *,
    neurons: int,
    zeros: Tensor | None = None,
    shifts: Tensor | None = None,
) -> PackedColumns:
    """The columns of a matrix in the order of the kernels.

    Args:
        layout: How columns are packed.
        codes: uint8, ``[outputs, neurons]`` for 8 bits, ``[outputs, ceil(neurons / 2)]`` for 4,
            where the low half of a byte is the even neuron.
        scales: ``[outputs, groups]`` in ``layout.scale_dtype``.
        neurons: How many.
        zeros: uint8, the shape of the scales, with ``ZeroMode.ZEROS``.
        shifts: The shape and dtype of the scales, with ``ZeroMode.SHIFTS``.

    Raises:
        ShapeError: If a shape or dtype is not that of the layout.
    """
    check_given(layout, "zeros", zeros, ZeroMode.ZEROS)
    check_given(layout, "shifts", shifts, ZeroMode.SHIFTS)
    stored = neurons if layout.bits == 8 else -(-neurons // 2)
    if tuple(codes.shape) != (layout.outputs, stored) or codes.dtype != torch.uint8:
        raise ShapeError(
            f"codes must be {[layout.outputs, stored]} of uint8, "
            f"got {list(codes.shape)} of {codes.dtype}"
        )
    columns = codes.new_zeros(neurons, layout.pitch)
    step = 2048  # neurons; even, so that no byte of codes is cut
    for start in range(0, neurons, step):
        end = min(start + step, neurons)
        if layout.bits == 8:
            columns[start:end, : layout.outputs] = codes[:, start:end].t()
        else:
            part = codes[:, start // 2 : (end + 1) // 2]
            neuron = torch.stack([part & 15, part >> 4], dim=-1).flatten(1).t()[: end - start]
            columns[start:end, : layout.outputs // 2] = neuron[:, ::2] | neuron[:, 1::2] << 4
    extras = zeros if layout.zero_mode == ZeroMode.ZEROS else shifts
    extras = None if extras is None else _transposed(extras)
    return PackedColumns(columns, _transposed(scales), extras, layout)


def unpack_columns(packed: PackedColumns) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Codes, scales, zeros and shifts, as :func:`pack_columns` takes them."""
    layout, columns = packed.layout, packed.columns
    neurons = len(columns)
    stored = neurons if layout.bits == 8 else -(-neurons // 2)
    codes = columns.new_zeros(layout.outputs, stored)
    step = 2048
    for start in range(0, neurons, step):
        end = min(start + step, neurons)
        if layout.bits == 8:
            codes[:, start:end] = columns[start:end, : layout.outputs].t()
            continue
        part = columns[start:end, : layout.outputs // 2]
        outputs = torch.stack([part & 15, part >> 4], dim=-1).flatten(1).t()
        if outputs.shape[1] % 2:
            outputs = torch.nn.functional.pad(outputs, (0, 1))
        codes[:, start // 2 : (end + 1) // 2] = outputs[:, ::2] | outputs[:, 1::2] << 4
    extras = None if packed.extras is None else _transposed(packed.extras)
    is_zeros = layout.zero_mode == ZeroMode.ZEROS
    return (
        codes,
        _transposed(packed.scales),
        extras if is_zeros else None,
        None if is_zeros else extras,
    )


def _transposed(table: Tensor) -> Tensor:
    """A copy, also of one row or column, which ``contiguous()`` would give back as it is."""
    return table.t().clone(memory_format=torch.contiguous_format)
