"""The kernels of packed MLPs. :mod:`cats.ops` checks shapes and layouts before.

Programs first decide which of their neurons are kept, and then work on these alone, a chunk at a
time: :func:`chunk_of` gives the numbers of the kept neurons of one chunk.
"""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, assignment"

import triton
import triton.language as tl

from cats.ops.mlp.triton.kernels import activate
from cats.ops.packed_linear.triton.kernels import dot_rows, numbers


@triton.jit
def chunk_of(needed, first, CHUNK: tl.constexpr):
    """``[CHUNK, ROWS]``: where the ``first + i``-th needed row is row ``j``; at most one per ``i``.

    Args:
        needed: ``[ROWS]``.
    """
    position = tl.cumsum(needed.to(tl.int32), axis=0) - 1
    wanted = first + tl.arange(0, CHUNK)
    return needed[None, :] & (position[None, :] == wanted[:, None])


@triton.jit
def multiply_branches(
    x,
    routing,
    other,
    thresholds,
    routing_bias,
    other_bias,
    product_thresholds,
    products,
    batch,
    neurons,
    columns,
    pitch,
    CODES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE_ROUTES: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_UNITS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_UNITS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Each program writes the products of ``ROWS`` neurons, ``[batch, neurons]``; 0 for dropped.

    ``routing`` is the weight of the router (gate or up), ``other`` that of the other branch.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = rows < neurons
    token = tl.arange(0, TOKENS)
    asked = (token < batch)[None, :]
    routed = dot_rows(
        routing, rows, exists, x, batch, columns, pitch, CODES, ROWS, ROW_UNITS, TOKENS, STAGES
    )
    if routing_bias is not None:
        routed += tl.load(routing_bias + rows, mask=exists, other=0).to(tl.float32)[:, None]
    if GATE_ROUTES:
        routed = activate(routed, ACTIVATION)
    threshold = tl.load(thresholds + rows, mask=exists, other=0)[:, None]
    # kept and not an exact zero, which adds nothing; NaN is kept
    keeps = exists[:, None] & asked & ~(tl.abs(routed) < threshold) & (routed != 0)
    routed = tl.where(keeps, routed, 0)
    needed = tl.max(keeps.to(tl.int32), axis=1) > 0
    # int64: batch * neurons may pass 2**31
    token_starts = token.to(tl.int64)[None, :] * neurons
    dropped = (exists & ~needed)[:, None] & asked
    tl.store(products + token_starts + rows[:, None], tl.zeros_like(routed), mask=dropped)

    count = tl.sum(needed.to(tl.int32), axis=0)
    for first in range(0, count, CHUNK):
        chosen = chunk_of(needed, first, CHUNK)
        kept = tl.sum(tl.where(chosen, rows[None, :], 0), axis=1)
        is_row = first + tl.arange(0, CHUNK) < count
        o = dot_rows(
            other, kept, is_row, x, batch, columns, pitch, CODES, CHUNK, CHUNK_UNITS, TOKENS, STAGES
        )
        if other_bias is not None:
            o += tl.load(other_bias + kept, mask=is_row, other=0).to(tl.float32)[:, None]
        if not GATE_ROUTES:
            o = activate(o, ACTIVATION)
        r = tl.sum(tl.where(chosen[:, :, None], routed[None, :, :], 0), axis=1)
        h = tl.where(r != 0, r * o, 0)
        if product_thresholds is not None:
            t = tl.load(product_thresholds + kept, mask=is_row, other=0)[:, None]
            h = tl.where(tl.abs(h) < t, 0, h)
        tl.store(products + token_starts + kept[:, None], h, mask=is_row[:, None] & asked)


@triton.jit
def load_column_numbers(
    packed,
    scales,
    extras,
    kept,
    is_column,
    byte,
    part,
    outputs,
    pitch,
    CODES: tl.constexpr,
    ONE_GROUP: tl.constexpr,
):
    """The numbers of one part of the bytes of columns, ``[CHUNK, BYTES]`` in float32.

    Args:
        kept: Which columns, ``[CHUNK]``.
        is_column: Which of them, ``[CHUNK]``; others are not read, and are 0.
        byte: Which bytes of each, ``[BYTES]``.
        part: Of a byte: with 4 bits, 0 is its lower half and 1 its upper half.
        ONE_GROUP: Whether all these columns are of one group.
    """
    output = byte * CODES.parts + part
    exists = output < outputs
    mask = is_column[:, None] & exists[None, :]
    # int64: neurons * pitch passes 2**31
    offsets = kept.to(tl.int64)[:, None] * pitch + byte[None, :]
    codes = tl.load(packed + offsets, mask=mask, other=0)
    if CODES.parts == 2:
        codes = codes >> 4 if part == 1 else codes & 15
    # [1] where all columns have the scales of the first
    of_table = kept
    in_table = is_column
    if ONE_GROUP:
        of_table = tl.max(tl.where(is_column, kept, 0), axis=0) + tl.zeros([1], tl.int32)
        in_table = tl.full([1], 1, tl.int1)
    group = of_table * 0
    if CODES.group_size > 0:
        group = of_table // CODES.group_size
    mask = in_table[:, None] & exists[None, :]
    offsets = group.to(tl.int64)[:, None] * outputs + output[None, :]
    scale = tl.load(scales + offsets, mask=mask, other=0)
    zeros = CODES.zero
    if CODES.has_zeros:
        zeros = tl.load(extras + offsets, mask=mask, other=0).to(tl.int32)
    shifts = None
    if CODES.has_shifts:
        shifts = tl.load(extras + offsets, mask=mask, other=0)
    values = numbers(codes, zeros, scale, shifts, CODES.arithmetic)
    # what is not read must not become NaN by the scale of another column
    return tl.where(is_column[:, None], values, 0)


@triton.jit
def add_columns(
    products,
    packed,
    scales,
    extras,
    partial,
    batch,
    neurons,
    outputs,
    pitch,
    CODES: tl.constexpr,
    NUMBER: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    SEGMENT: tl.constexpr,
    CHUNK: tl.constexpr,
    BYTES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Sums of columns times products, over every ``num_programs(1)``-th segment of neurons.

    A program works on ``BYTES`` bytes of each column. Its sums go to ``partial[program]``,
    ``[batch, outputs]``, float32.

    Args:
        NUMBER: The type that numbers are rounded to, that of the inputs.
        SEGMENT: Neurons that a program looks through at once.
    """
    byte = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    program, programs = tl.program_id(1), tl.num_programs(1)
    token = tl.arange(0, TOKENS)
    # int64: batch * neurons may pass 2**31
    token_starts = token.to(tl.int64) * neurons
    asked = token < batch
    PARTS: tl.constexpr = CODES.parts
    # one token: a sum for each column of a chunk, added at the end
    HEIGHT: tl.constexpr = CHUNK if TOKENS == 1 else TOKENS
    low = tl.zeros([HEIGHT, BYTES], tl.float32)
    high = tl.zeros([HEIGHT, BYTES], tl.float32)
    for start in range(program * SEGMENT, neurons, programs * SEGMENT):
        columns = start + tl.arange(0, SEGMENT)
        exists = asked[:, None] & (columns < neurons)[None, :]
        h = tl.load(products + token_starts[:, None] + columns[None, :], mask=exists, other=0)
        # NaN is needed
        needed = tl.max((h != 0).to(tl.int32), axis=0) > 0
        count = tl.sum(needed.to(tl.int32), axis=0)
        for first in range(0, count, CHUNK):
            chosen = chunk_of(needed, first, CHUNK)
            kept = tl.sum(tl.where(chosen, columns[None, :], 0), axis=1)
            is_column = first + tl.arange(0, CHUNK) < count
            mask = asked[:, None] & is_column[None, :]
            factors = tl.load(products + token_starts[:, None] + kept[None, :], mask=mask, other=0)
            for part in tl.static_range(PARTS):
                weights = load_column_numbers(
                    packed,
                    scales,
                    extras,
                    kept,
                    is_column,
                    byte,
                    part,
                    outputs,
                    pitch,
                    CODES,
                    ONE_GROUP,
                )
                weights = weights.to(NUMBER).to(tl.float32)
                if TOKENS == 1:
                    sums = tl.reshape(factors, [CHUNK])[:, None] * weights
                else:
                    sums = tl.dot(factors, weights, input_precision="ieee")
                if part == 0:
                    low += sums
                else:
                    high += sums
    for part in tl.static_range(PARTS):
        sums = low if part == 0 else high
        if TOKENS == 1:
            sums = tl.sum(sums, axis=0)[None, :]
        output = byte * PARTS + part
        # int64: programs * batch * outputs may pass 2**31
        starts = (program.to(tl.int64) * batch + token)[:, None] * outputs
        mask = asked[:, None] & (output < outputs)[None, :]
        tl.store(partial + starts + output[None, :], sums, mask=mask)


@triton.jit
def dequantise_columns(
    packed,
    scales,
    extras,
    out,
    neurons,
    outputs,
    pitch,
    CODES: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Each program writes ``BYTES`` bytes of ``COLUMNS`` columns to ``out``, ``[D, F]``."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exists = columns < neurons
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    PARTS: tl.constexpr = CODES.parts
    for part in tl.static_range(PARTS):
        values = load_column_numbers(
            packed, scales, extras, columns, exists, byte, part, outputs, pitch, CODES, ONE_GROUP
        )
        output = byte * PARTS + part
        # int64: D * F passes 2**31
        offsets = output.to(tl.int64)[:, None] * neurons + columns[None, :]
        mask = (output < outputs)[:, None] & exists[None, :]
        tl.store(out + offsets, tl.trans(values.to(out.dtype.element_ty)), mask=mask)
