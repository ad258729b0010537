"""Quantised matrices for tests of ``quantised.cu``, and how much rounding may change a product."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cats.ops.quantised.rows import PackedRows, RowLayout, ZeroMode, pack_rows
from cats.weights.quantised import packed

# KiB of shared memory that a block may have, by compute capability (CUDA programming guide).
SHARED = {(8, 0): 163, (8, 6): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}


@dataclass
class Matrix:
    packed: PackedRows
    values: Tensor  # [rows, columns], float64


def make_layout(bits, columns, group_size, zero_mode=ZeroMode.CONSTANT, scale_dtype=torch.float16):
    return RowLayout(
        bits=bits,
        columns=columns,
        group_size=group_size,
        scale_dtype=scale_dtype,
        zero_mode=zero_mode,
        zero=constant_zero(bits, zero_mode),
    )


def constant_zero(bits, zero_mode):
    """The zero point of a layout: the middle code, unless groups have their own."""
    return 0 if zero_mode == ZeroMode.ZEROS else 2 ** (bits - 1)


def make_matrix(layout: RowLayout, rows: int, *, scales=None, device="cpu") -> Matrix:
    """Random codes; values of about unit variance over the square root of the columns."""
    high, columns = 2**layout.bits, layout.columns
    codes = torch.randint(0, high, (rows, columns), dtype=torch.uint8, device=device)
    shape = rows, layout.groups
    unit = 4 / high / columns**0.5
    if scales is None:
        scales = (torch.rand(shape, device=device) + 0.5) * unit
        scales = scales.to(layout.scale_dtype)
    zeros = torch.randint(0, high, shape, dtype=torch.uint8, device=device)
    shifts = (torch.randn(shape, device=device) * unit).to(layout.scale_dtype)
    zeros = zeros if layout.zero_mode == ZeroMode.ZEROS else None
    shifts = shifts if layout.zero_mode == ZeroMode.SHIFTS else None

    def wide(table):
        size = layout.group_size or columns
        return table.double().repeat_interleave(size, dim=1)[:, :columns]

    zero = layout.zero if zeros is None else wide(zeros)
    values = (codes.double() - zero) * wide(scales)
    if shifts is not None:
        values += wide(shifts)
    stored = codes if layout.bits == 8 else packed(codes)
    data = pack_rows(layout, stored, scales, zeros=zeros, shifts=shifts)
    return Matrix(PackedRows(data, layout, rows), values)


def error_bound(values: Tensor, x: Tensor, largest: Tensor | None = None) -> Tensor:
    """The largest error that 16-bit fixed point and sums in float32 explain.

    Fixed point moves a value of x by up to half of 1 / 32512 of the largest value nearby, which is
    at most the largest of all (the default of ``largest``).
    """
    largest = x.abs().max() if largest is None else largest
    rounding = (values.abs() * largest).sum(1) / 65024
    return 1.001 * rounding + 2e-6 * (values.abs() @ x.abs()) + 1e-7


def columns_nearby(layout: RowLayout) -> int:
    """How many columns are rounded relative to the same largest value, at most."""
    units = -(-layout.width // layout.unit // layout.warps)
    units += units % 2 * (layout.bits == 8 and layout.group_size == 128)
    subset = -(-units // 4)
    subset += subset % 2 * (layout.bits == 8 and layout.group_size == 128)
    return subset * layout.unit
