"""Rows of quantised matrices as CUDA kernels stream them; ``integer_dot.cuh`` is the reader.

A packed row is

    codes | scales | zeros (uint8) or shifts (as the scales), by the zero mode | padding

and a value is ``(code - zero) * scale + shift``. Codes lie in units of 64 bytes, in which columns
are ordered for the integer products of tensor cores: each product takes 32 consecutive columns. So
a product lies within one group, whatever the group size.
"""

from collections.abc import Iterator, Sequence
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

__all__ = ["SCALE_CODES", "PackedRows", "RowLayout", "ZeroMode", "pack_rows", "unpack_rows"]

_GROUP_SIZES = 0, 16, 32, 64, 128
_UNIT_BYTES = 64
# Columns of a product of tensor cores.
_PRODUCT = 32
# What is packed at once: the copies that this makes take a few times as much.
_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLayout:
    """How the rows of a matrix are packed. Two matrices of one layout can share a launch.

    Attributes:
        bits: Of a code, 4 or 8.
        columns: Of the matrix.
        group_size: Consecutive columns that share a scale: 16 (on a CPU), 32, 64 or 128, or 0
            where a whole row shares one.
        scale_dtype: float16, bfloat16 or float32.
        zero_mode: What a row holds besides codes and scales.
        zero: The constant zero point; 0 with :attr:`ZeroMode.ZEROS`.
    """

    bits: int
    columns: int
    group_size: int
    scale_dtype: torch.dtype
    zero_mode: ZeroMode = ZeroMode.CONSTANT
    zero: int = 0

    def __post_init__(self) -> None:
        check_codes(self, "rows that hold zero points have no constant one")
        if self.columns < 1:
            raise ShapeError(f"a matrix must have at least one column, got {self.columns}")
        if self.group_size not in _GROUP_SIZES:
            raise UnsupportedModelError(
                "groups must have 16, 32, 64 or 128 columns (0: a whole row), got "
                f"{self.group_size}"
            )

    @staticmethod
    def of(numbers: Sequence[int]) -> "RowLayout":
        """The layout that :attr:`numbers` stand for."""
        return _layout(tuple(numbers))

    @property
    def numbers(self) -> tuple[int, ...]:
        """The layout as an operator of torch takes it."""
        scale, mode = SCALE_CODES[self.scale_dtype], int(self.zero_mode)
        return self.bits, self.columns, self.group_size, scale, mode, self.zero

    @property
    def unit(self) -> int:
        """Columns in 64 bytes."""
        return 8 * _UNIT_BYTES // self.bits

    @property
    def width(self) -> int:
        """Columns, padded to whole units."""
        return -(-self.columns // self.unit) * self.unit

    @property
    def warps(self) -> int:
        """Warps that share a row in the kernels."""
        return 8 if self.width > 4 * self.unit else 4

    @property
    def groups(self) -> int:
        """Scales of a row of the matrix."""
        return -(-self.columns // self.group_size) if self.group_size else 1

    @property
    def padded_groups(self) -> int:
        """Scales of a packed row."""
        return -(-self.width // self.group_size) if self.group_size else 1

    @property
    def code_bytes(self) -> int:
        """Of a packed row; the scales follow."""
        return self.width * self.bits // 8

    @property
    def used_bytes(self) -> int:
        """Codes, scales and zeros or shifts of a packed row."""
        scale = self.scale_dtype.itemsize
        extra = {ZeroMode.CONSTANT: 0, ZeroMode.ZEROS: 1, ZeroMode.SHIFTS: scale}[self.zero_mode]
        return self.code_bytes + self.padded_groups * (scale + extra)

    @property
    def pitch(self) -> int:
        """Bytes from one packed row to the next.

        Never a multiple of 128: rows lie in shared memory as they do here, and the same place of
        two rows must be in different banks.
        """
        pitch = -(-self.used_bytes // 32) * 32
        return pitch + 32 * (pitch % 128 == 0)

    @property
    def refused_by_gpus(self) -> str | None:
        """Why kernels of a GPU do not read such rows, or None."""
        if self.group_size and self.group_size < _PRODUCT:
            return f"on a GPU, groups have {_PRODUCT} columns or more, got {self.group_size}"
        return None

    @property
    def macros(self) -> dict[str, int]:
        """What ``integer_dot.cuh`` wants to know of the rows.

        Raises:
            UnsupportedModelError: If it does not read such rows.
        """
        if reason := self.refused_by_gpus:
            raise UnsupportedModelError(reason)
        return dict(
            BITS=self.bits,
            WIDTH=self.width,
            GROUP=self.group_size,
            SCALE=SCALE_CODES[self.scale_dtype],
            ZERO_MODE=int(self.zero_mode),
            CONSTANT_ZERO=self.zero,
            WARPS=self.warps,
        )


# cached, since an operator asks at each call
@cache
def _layout(numbers: tuple[int, ...]) -> RowLayout:
    bits, columns, group_size, scale, mode, zero = numbers
    return RowLayout(
        bits=bits,
        columns=columns,
        group_size=group_size,
        scale_dtype=SCALE_DTYPES[scale],
        zero_mode=ZeroMode(mode),
        zero=zero,
    )


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A packed matrix.

    Attributes:
        rows: ``[count, pitch]``, uint8.
        layout: How they are packed.
        count: How many rows.
    """

    rows: Tensor
    layout: RowLayout
    count: int

    def __post_init__(self) -> None:
        shape = (self.count, self.layout.pitch)
        if tuple(self.rows.shape) != shape or self.rows.dtype != torch.uint8:
            raise ShapeError(
                f"packed rows must be {list(shape)} of uint8, "
                f"got {list(self.rows.shape)} of {self.rows.dtype}"
            )


def pack_rows(
    layout: RowLayout,
    codes: Tensor,
    scales: Tensor,
    *,
    zeros: Tensor | None = None,
    shifts: Tensor | None = None,
) -> Tensor:
    """The rows of a matrix in the order of the kernels.

    Args:
        layout: How rows are packed.
        codes: uint8, ``[rows, columns]`` for 8 bits, and ``[rows, ceil(columns / 2)]`` for 4, where
            the low half of a byte is the even column.
        scales: ``[rows, groups]`` in ``layout.scale_dtype``.
        zeros: uint8, the shape of the scales, with ``ZeroMode.ZEROS``.
        shifts: The shape and dtype of the scales, with ``ZeroMode.SHIFTS``.

    Returns:
        uint8, ``[rows, layout.pitch]``, on the device of the codes.

    Raises:
        ShapeError: If a shape or dtype is not that of the layout.
    """
    rows = len(codes)
    stored = layout.columns if layout.bits == 8 else -(-layout.columns // 2)
    _check("codes", codes, (rows, stored), torch.uint8)
    tables = [("scales", scales, layout.scale_dtype)]
    for name, table, mode, dtype in (
        ("zeros", zeros, ZeroMode.ZEROS, torch.uint8),
        ("shifts", shifts, ZeroMode.SHIFTS, layout.scale_dtype),
    ):
        check_given(layout, name, table, mode)
        if table is not None:
            tables.append((name, table, dtype))
    for name, table, dtype in tables:
        _check(name, table, (rows, layout.groups), dtype)
    packed = codes.new_zeros(rows, layout.pitch)
    for block in _blocks(layout, rows):
        packed[block, : layout.code_bytes] = _pack_codes(layout, codes[block])
        start = layout.code_bytes
        for _, table, _ in tables:
            padded = table.new_zeros(len(codes[block]), layout.padded_groups)
            padded[:, : layout.groups] = table[block]
            data = padded.view(torch.uint8)
            packed[block, start : start + data.shape[1]] = data
            start += data.shape[1]
    return packed


def unpack_rows(
    layout: RowLayout, packed: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Codes, scales, zeros and shifts, as :func:`pack_rows` takes them.

    Raises:
        ShapeError: If the rows are not of this layout.
    """
    rows = len(packed)
    _check("packed rows", packed, (rows, layout.pitch), torch.uint8)
    stored = layout.columns if layout.bits == 8 else -(-layout.columns // 2)
    codes = packed.new_empty(rows, stored)
    for block in _blocks(layout, rows):
        codes[block] = _unpack_codes(layout, packed[block, : layout.code_bytes])
    start = layout.code_bytes

    def table(dtype: torch.dtype) -> Tensor:
        nonlocal start
        end = start + layout.padded_groups * dtype.itemsize
        data = packed[:, start:end].contiguous().view(dtype)
        start = end
        return data[:, : layout.groups].contiguous()

    scales = table(layout.scale_dtype)
    zeros = table(torch.uint8) if layout.zero_mode == ZeroMode.ZEROS else None
    shifts = table(layout.scale_dtype) if layout.zero_mode == ZeroMode.SHIFTS else None
    return codes, scales, zeros, shifts


# Column 32 * q + 16 * h + 4 * t + b of a unit lies in byte 16 * t + 4 * w + b. With 8 bits, w is
# 2 * q + h. With 4 bits, q is 2 * j + p and w is 2 * j + h, where p is the half of the byte.


def _pack_codes(layout: RowLayout, codes: Tensor) -> Tensor:
    rows, units = len(codes), layout.width // layout.unit
    if layout.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)[:, : layout.columns]
    padded = codes.new_full((rows, layout.width), layout.zero)
    padded[:, : layout.columns] = codes
    if layout.bits == 4:
        halves = padded.view(rows, units, 2, 2, 2, 4, 4)  # j, p, h, t, b
        padded = halves[:, :, :, 0] | halves[:, :, :, 1] << 4
    ordered = padded.view(rows, units, 2, 2, 4, 4).permute(0, 1, 4, 2, 3, 5)
    return ordered.reshape(rows, layout.code_bytes)


def _unpack_codes(layout: RowLayout, data: Tensor) -> Tensor:
    rows, units = len(data), layout.width // layout.unit
    codes = data.reshape(rows, units, 4, 2, 2, 4).permute(0, 1, 3, 4, 2, 5)  # j (or q), h, t, b
    if layout.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=3)
    codes = codes.reshape(rows, layout.width)[:, : layout.columns]
    if layout.bits == 8:
        return codes
    if layout.columns % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, ::2] | codes[:, 1::2] << 4


def _blocks(layout: RowLayout, rows: int) -> Iterator[slice]:
    step = max(1, _BLOCK_BYTES // layout.width)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _check(name: str, tensor: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ShapeError(
            f"{name} must be {list(shape)} of {dtype}, got {list(tensor.shape)} of {tensor.dtype}"
        )
