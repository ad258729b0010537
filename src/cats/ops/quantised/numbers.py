"""The numbers that codes, scales and zero points stand for, by operators of torch.

A number of a matrix is ``(code - zero) * scale + shift``. Every operation rounds to the dtype in
which the format of the checkpoint computes, so that the numbers are its own, bit for bit.
"""

import torch
from torch import Tensor, nn

from cats.ops.quantised.columns import PackedColumns, unpack_columns
from cats.ops.quantised.rows import RowLayout, unpack_rows

__all__ = ["numbers_of", "numbers_of_columns", "numbers_of_rows", "packed", "unpacked"]


def numbers_of(
    codes: Tensor,
    scales: Tensor,
    *,
    bits: int,
    columns: int,
    group_size: int,
    zeros: Tensor | None,
    zero: int,
    shifts: Tensor | None,
    arithmetic: torch.dtype,
) -> Tensor:
    """The numbers ``[rows, columns]`` in the dtype ``arithmetic``.

    Args:
        codes: ``[rows, columns]``, or of 4 bits ``[rows, ceil(columns / 2)]``.
        scales: ``[rows, groups]``.
        bits: Of a code.
        columns: Of the matrix.
        group_size: Consecutive columns that share a scale.
        zeros: The shape of the scales, or None where all are ``zero``.
        zero: The zero point where there are no zeros.
        shifts: The shape of the scales, or None.
        arithmetic: What each operation rounds to.
    """
    # in place: one temporary matrix instead of four
    numbers = unpacked(codes, bits, columns).to(arithmetic)
    if zeros is None and zero:
        numbers.sub_(zero)
    whole = columns // group_size
    end = whole * group_size
    # the last group may be shorter
    parts = [(numbers[:, :end].unflatten(1, (whole, group_size)), slice(whole))]
    if end < columns:
        parts.append((numbers[:, end:].unsqueeze(1), slice(whole, None)))
    for part, groups in parts:
        if zeros is not None:
            part.sub_(zeros[:, groups, None].to(arithmetic))
        part.mul_(scales[:, groups, None].to(arithmetic))
        if shifts is not None:
            part.add_(shifts[:, groups, None].to(arithmetic))
    return numbers


def numbers_of_rows(
    rows: Tensor, layout: RowLayout, arithmetic: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """The numbers of packed rows, ``[rows, columns]`` in ``dtype``."""
    codes, scales, zeros, shifts = unpack_rows(layout, rows)
    return numbers_of(
        codes,
        scales,
        bits=layout.bits,
        columns=layout.columns,
        group_size=layout.group_size or layout.columns,
        zeros=zeros,
        zero=layout.zero,
        shifts=shifts,
        arithmetic=arithmetic,
    ).to(dtype)


def numbers_of_columns(
    packed_columns: PackedColumns, arithmetic: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """The numbers of packed columns, ``[outputs, neurons]`` in ``dtype``."""
    layout, neurons = packed_columns.layout, len(packed_columns.columns)
    codes, scales, zeros, shifts = unpack_columns(packed_columns)
    return numbers_of(
        codes,
        scales,
        bits=layout.bits,
        columns=neurons,
        group_size=layout.group_size or neurons,
        zeros=zeros,
        zero=layout.zero,
        shifts=shifts,
        arithmetic=arithmetic,
    ).to(dtype)


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
