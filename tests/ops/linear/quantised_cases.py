"""Quantised matrices for tests of ``quantised.cu``, and what rounding may change of a product."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cats.ops.quantised.rows import PackedRows, RowLayout, ZeroMode, pack_rows


@dataclass
class Matrix:
    packed: PackedRows
    values: Tensor  # [rows, columns], float64


def make_layout(bits, columns, group_size, zero_mode=ZeroMode.CONSTANT, scale_dtype=torch.float16):
    zero = 0 if zero_mode == ZeroMode.ZEROS else 2 ** (bits - 1)
    return RowLayout(
        bits=bits, columns=columns, group_size=group_size, scale_dtype=scale_dtype,
        zero_mode=zero_mode, zero=zero,
    )  # fmt: skip


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
    stored = codes
    if layout.bits == 4:
        even = torch.nn.functional.pad(codes, (0, columns % 2))
        stored = even[:, ::2] | even[:, 1::2] << 4
    packed = pack_rows(layout, stored, scales, zeros=zeros, shifts=shifts)
    return Matrix(PackedRows(packed, layout, rows), values)


def error_bound(values: Tensor, x: Tensor, largest: Tensor | None = None) -> Tensor:
    """Of 16-bit fixed point: a value of x is off by half of 1 / 32512 of the largest nearby.

    The largest of all of x is an upper bound of that. Sums in float32 come on top.
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
