"""The two kernels. :mod:`cats.ops.experts` checks shapes and layouts before."""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, assignment"

import triton
import triton.language as tl

from cats.ops.mlp.triton.kernels import activate, dot_rows, load_rows


@triton.jit
def stream_experts(
    x,
    index,
    gate_up,
    down,
    thresholds,
    partial,
    D,
    F,
    E,
    PLACES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Each program takes every ``num_programs(0)``-th block of neurons of one pair.

    ``down`` is read as ``[E, F, D]``. The sums over a program's neurons stay in registers and go to
    ``partial[program, pair]``, ``[D]``, float32.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    pair, pairs = tl.program_id(1), tl.num_programs(1)
    columns = tl.arange(0, BLOCK_D)
    in_row = columns < D
    expert = tl.load(index + pair)
    # a number that no expert has adds nothing
    exists = (expert >= 0) & (expert < E)
    # int64: E * F * D passes 2**31
    size = tl.where(exists, expert, 0).to(tl.int64) * F * D
    # the rows of up follow those of gate
    gate = gate_up + 2 * size
    columns_of_down = down + size
    threshold = tl.load(thresholds + expert, mask=exists, other=0)
    token = tl.load(x + (pair // PLACES) * D + columns, mask=in_row, other=0)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(program * ROWS, F, programs * ROWS):
        rows = start + tl.arange(0, ROWS)
        own = tl.where(exists, rows, F) < F
        a = dot_rows(load_rows(gate, rows, own, D, BLOCK_D), token, None, rows, own)
        a = activate(a, ACTIVATION)
        # kept and not an exact zero, which adds nothing; NaN is kept
        keep = own & ~(tl.abs(a) < threshold) & (a != 0)
        if tl.max(keep.to(tl.int32), axis=0) > 0:
            # a kept neuron needs both, so both are requested at once
            up_tile = load_rows(gate, rows + F, keep, D, BLOCK_D)
            down_tile = load_rows(columns_of_down, rows, keep, D, BLOCK_D)
            h = tl.where(keep, a * dot_rows(up_tile, token, None, rows, keep), 0)
            # a column that is not needed counts as 0, whatever it holds
            weights = tl.where((h != 0)[:, None], down_tile.to(tl.float32), 0)
            total += tl.sum(weights * h[:, None], axis=0)
    start_of_sum = (program.to(tl.int64) * pairs + pair) * D
    tl.store(partial + start_of_sum + columns, total, mask=in_row)


@triton.jit
def add_experts(
    partial,
    shares,
    out,
    programs,
    pairs,
    D,
    PLACES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``out[token] = sum over its pairs of share * sum over programs of partial``, in order."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    token = tl.program_id(1)
    in_row = columns < D
    total = tl.zeros([BLOCK_D], tl.float32)
    for place in tl.static_range(PLACES):
        pair = token * PLACES + place
        share = tl.load(shares + pair).to(tl.float32)
        of_expert = tl.zeros([BLOCK_D], tl.float32)
        for program in range(0, programs):
            offset = (program * pairs + pair).to(tl.int64) * D
            of_expert += tl.load(partial + offset + columns, mask=in_row, other=0)
        total += share * of_expert
    tl.store(out + token * D + columns, total.to(out.dtype.element_ty), mask=in_row)
