"""The kernels of packed rows. :mod:`cats.ops` checks shapes and layouts before.

A unit of a row is 64 bytes of codes. Column ``32 * q + 16 * h + 4 * t + b`` of a unit lies in byte
``16 * t + 4 * w + b``: ``w`` is ``2 * q + h`` with 8 bits. With 4 bits, ``q`` is ``2 * j + p`` and
``w`` is ``2 * j + h``, where ``p`` is the half of the byte. The kernels keep this order, and look
up inputs and outputs by column. In a tile ``[.., t, j, 8]`` (with 8 bits, ``j`` is ``q``), the 8
last bytes have one scale in each half, since no group is smaller than 32 columns.
"""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, assignment"

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True, kw_only=True, slots=True)
class Codes:
    """What kernels know of codes when they are compiled.

    Attributes:
        parts: Codes in a byte.
        group_size: Consecutive numbers that share a scale; 0 where all do.
        scale: The type of scales.
        scale_bytes: Of one.
        has_zeros: Whether each group has a zero point.
        has_shifts: Whether each group has a shift, of the type of scales.
        zero: The zero point where groups have none.
        arithmetic: What each operation that makes a number rounds to.
        padded: Whether a row ends within a unit, so that codes follow its last one.
    """

    parts: int
    group_size: int
    scale: tl.dtype
    scale_bytes: int
    has_zeros: bool
    has_shifts: bool
    zero: int
    arithmetic: tl.dtype
    padded: bool


@triton.jit
def numbers(codes, zeros, scales, shifts, ARITHMETIC: tl.constexpr):
    """``(code - zero) * scale + shift`` in float32; each operation rounds to ``ARITHMETIC``."""
    # the difference of two codes is exact in every type
    values = (codes.to(tl.int32) - zeros).to(tl.float32)
    values = (values * scales.to(ARITHMETIC).to(tl.float32)).to(ARITHMETIC).to(tl.float32)
    if shifts is not None:
        values = (values + shifts.to(ARITHMETIC).to(tl.float32)).to(ARITHMETIC).to(tl.float32)
    return values


@triton.jit
def columns_of(first, part, CODES: tl.constexpr, UNITS: tl.constexpr):
    """Columns of one part of the bytes of units, from the unit ``first`` on, ``[UNITS * 64]``.

    Args:
        part: Of a byte: with 4 bits, 0 is its lower half and 1 its upper half.
    """
    byte = tl.arange(0, UNITS * 64)
    # j and p together: which 32 columns of the unit
    piece = byte // 8 % 2 * CODES.parts + part
    in_piece = byte // 4 % 2 * 16 + byte // 16 % 4 * 4 + byte % 4
    return (first + byte // 64) * (64 * CODES.parts) + piece * 32 + in_piece


@triton.jit
def load_codes(packed, starts, needed, first, units, UNITS: tl.constexpr):
    """Bytes ``[ROWS, UNITS * 64]``; rows that are not needed are not read, and give 0."""
    byte = tl.arange(0, UNITS * 64)
    mask = needed[:, None] & (first + byte // 64 < units)[None, :]
    offsets = starts[:, None] + (first * 64 + byte)[None, :]
    return tl.load(packed + offsets, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def load_table(packed, starts, groups, mask, DTYPE: tl.constexpr, ITEM_BYTES: tl.constexpr):
    """Scales, zero points or shifts, ``[ROWS, UNITS, 1, 2, 1]``.

    Args:
        starts: Of the table of each row, in bytes.
        groups: ``[UNITS, 2]``.
    """
    offsets = starts[:, None, None] + groups[None, :, :] * ITEM_BYTES
    values = tl.load((packed + offsets).to(tl.pointer_type(DTYPE)), mask=mask, other=0)
    return values[:, :, None, :, None]


@triton.jit
def load_numbers(
    packed,
    starts,
    needed,
    codes,
    first,
    part,
    columns,
    CODES: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """The numbers, ``[ROWS, UNITS * 64]`` in float32, of one part of the bytes ``codes``.

    Columns beyond the last are 0, whatever their scale is.

    Args:
        starts: Of the rows, in bytes.
        columns: Of the matrix.
    """
    units = tl.cdiv(columns, 64 * CODES.parts)
    if CODES.parts == 2:
        codes = codes >> 4 if part == 1 else codes & 15
    unit = first + tl.arange(0, UNITS)
    pieces = (2 * unit[:, None] + tl.arange(0, 2)[None, :]) * CODES.parts + part
    groups = pieces * 0
    groups_in_all = 1
    if CODES.group_size > 0:
        groups = pieces * 32 // CODES.group_size
        groups_in_all = tl.cdiv(units * 64 * CODES.parts, CODES.group_size)
    mask = needed[:, None, None] & (unit < units)[None, :, None]
    # the tables of a row follow its codes
    table = starts + units * 64
    scales = load_table(packed, table, groups, mask, CODES.scale, CODES.scale_bytes)
    table += groups_in_all * CODES.scale_bytes
    zeros = CODES.zero
    if CODES.has_zeros:
        zeros = load_table(packed, table, groups, mask, tl.uint8, 1).to(tl.int32)
    shifts = None
    if CODES.has_shifts:
        shifts = load_table(packed, table, groups, mask, CODES.scale, CODES.scale_bytes)
    tile = tl.reshape(codes, [ROWS, UNITS, 4, 2, 8])
    values = numbers(tile, zeros, scales, shifts, CODES.arithmetic)
    values = tl.reshape(values, [ROWS, UNITS * 64])
    if CODES.padded:
        exists = columns_of(first, part, CODES, UNITS) < columns
        values = tl.where(exists[None, :], values, 0)
    return values


@triton.jit
def dot_rows(
    packed,
    rows,
    needed,
    x,
    batch,
    columns,
    pitch,
    CODES: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``numbers(rows) @ x.T``, ``[ROWS, TOKENS]``, in float32; 0 for rows that are not needed.

    Args:
        rows: Which rows, ``[ROWS]``.
        needed: Which of them, ``[ROWS]``; others are not read.
        TOKENS: At least ``batch``; 1, or a size for tensor cores.
        STAGES: Tiles that are on their way at once.
    """
    # int64: rows * pitch passes 2**31
    starts = rows.to(tl.int64) * pitch
    PARTS: tl.constexpr = CODES.parts
    units = tl.cdiv(columns, 64 * PARTS)
    token = tl.arange(0, TOKENS)
    # of one token: sums of 8 neighbours, which lie in one thread, and sums of all at the end
    sums = tl.zeros([ROWS, UNITS * 8 if TOKENS == 1 else TOKENS], tl.float32)
    for first in tl.range(0, units, UNITS, num_stages=STAGES):
        codes = load_codes(packed, starts, needed, first, units, UNITS)
        for part in tl.static_range(PARTS):
            weights = load_numbers(
                packed, starts, needed, codes, first, part, columns, CODES, ROWS, UNITS
            ).to(x.dtype.element_ty)
            column = columns_of(first, part, CODES, UNITS)
            exists = column < columns
            if TOKENS == 1:
                inputs = tl.load(x + column, mask=exists, other=0)
                products = weights.to(tl.float32) * inputs.to(tl.float32)[None, :]
                sums += tl.sum(tl.reshape(products, [ROWS, UNITS * 8, 8]), axis=2)
            else:
                inputs = tl.load(
                    x + column[:, None] + token[None, :] * columns,
                    mask=exists[:, None] & (token < batch)[None, :],
                    other=0,
                )
                sums = tl.dot(weights, inputs, sums, input_precision="ieee")
    return tl.sum(sums, axis=1)[:, None] if TOKENS == 1 else sums


@triton.jit
def packed_linear(
    x,
    packed,
    bias,
    out,
    batch,
    rows_in_all,
    columns,
    pitch,
    CODES: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Each program computes ``ROWS`` outputs of all tokens."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = rows < rows_in_all
    y = dot_rows(packed, rows, exists, x, batch, columns, pitch, CODES, ROWS, UNITS, TOKENS, STAGES)
    if bias is not None:
        y += tl.load(bias + rows, mask=exists, other=0).to(tl.float32)[:, None]
    token = tl.arange(0, TOKENS)
    offsets = token[None, :] * rows_in_all + rows[:, None]
    mask = exists[:, None] & (token < batch)[None, :]
    tl.store(out + offsets, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def dequantise_rows(
    packed,
    out,
    rows_in_all,
    columns,
    pitch,
    CODES: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Each program writes ``UNITS`` units of ``ROWS`` rows of ``out``."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = rows < rows_in_all
    first = tl.program_id(1) * UNITS
    # int64: rows * pitch passes 2**31
    starts = rows.to(tl.int64) * pitch
    PARTS: tl.constexpr = CODES.parts
    units = tl.cdiv(columns, 64 * PARTS)
    codes = load_codes(packed, starts, exists, first, units, UNITS)
    for part in tl.static_range(PARTS):
        values = load_numbers(
            packed, starts, exists, codes, first, part, columns, CODES, ROWS, UNITS
        )
        column = columns_of(first, part, CODES, UNITS)
        offsets = rows.to(tl.int64)[:, None] * columns + column[None, :]
        mask = exists[:, None] & (column < columns)[None, :]
        tl.store(out + offsets, values.to(out.dtype.element_ty), mask=mask)
