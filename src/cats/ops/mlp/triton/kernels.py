"""The kernels. :mod:`cats.ops` checks shapes and layouts before."""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, assignment"

# ruff: noqa: RUF005 (Triton does not have unpacking into a tuple)

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation in float32; NaN and infinities come out as in PyTorch."""
    if ACTIVATION == "silu":
        y = x / (1 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(z)) is the logistic function of 2 * z
        z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x / (1 + tl.exp(-2 * z))
    else:
        # not tl.maximum, which loses NaN
        y = tl.where(x <= 0, 0.0, x)
    return y


@triton.jit
def load_rows(weight, rows, needed, D, BLOCK_D: tl.constexpr):
    """Tile ``[ROWS, BLOCK_D]`` of a row-major ``[F, D]``; rows that are not needed are not read."""
    columns = tl.arange(0, BLOCK_D)
    # int64: F * D passes 2**31
    offsets = rows.to(tl.int64)[:, None] * D + columns[None, :]
    mask = needed[:, None] & (columns < D)[None, :]
    return tl.load(weight + offsets, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def dot_rows(tile, x, bias, rows, needed):
    """``tile @ x + bias``, ``[ROWS]``, in float32."""
    y = tl.sum(tile.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
    if bias is not None:
        y += tl.load(bias + rows, mask=needed, other=0).to(tl.float32)
    return y


@triton.jit
def sum_columns(
    x,
    weight,
    thresholds,
    sums,
    D,
    F,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """``sums[b] = weight @ keep(x[b])``, ``[BATCH, F]``, float32; dropped columns are not read.

    ``weight`` is column-major, so it is read as ``[D, F]``. Each program has ``BLOCK_F`` outputs.
    """
    if DEPENDENT:
        # before any load: the previous kernel may write the weights
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    neurons = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    totals = ()
    for _ in tl.static_range(BATCH):
        totals = totals + (tl.zeros([BLOCK_F], tl.float32),)
    for first in range(0, D, ROWS):
        inputs = first + tl.arange(0, ROWS)
        exists = inputs < D
        threshold = tl.load(thresholds + inputs, mask=exists, other=0)
        values = ()
        needed = exists & False
        for b in tl.static_range(BATCH):
            value = tl.load(x + b * D + inputs, mask=exists, other=0).to(tl.float32)
            # NaN is kept
            value = tl.where(tl.abs(value) < threshold, 0, value)
            values = values + (value,)
            needed = needed | (value != 0)
        # int64: D * F passes 2**31
        offsets = inputs.to(tl.int64)[:, None] * F + neurons[None, :]
        mask = needed[:, None] & (neurons < F)[None, :]
        tile = tl.load(weight + offsets, mask=mask, other=0, eviction_policy="evict_first")
        new_totals = ()
        for b in tl.static_range(BATCH):
            products = tile.to(tl.float32) * values[b][:, None]
            new_totals = new_totals + (totals[b] + tl.sum(products, axis=0),)
        totals = new_totals
    for b in tl.static_range(BATCH):
        tl.store(sums + b * F + neurons, totals[b], mask=neurons < F)


@triton.jit
def stream_neurons(
    x,
    routing,
    other,
    down,
    thresholds,
    routing_bias,
    other_bias,
    product_thresholds,
    routed_sums,
    partial,
    D,
    F,
    ACTIVATION: tl.constexpr,
    GATE_ROUTES: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Each program takes every ``num_programs``-th block of ``ROWS`` neurons through the MLP.

    ``routing`` is the weight of the router (gate or up), ``other`` that of the other branch.
    Where ``routed_sums`` of :func:`sum_columns` are given, they stand for its products.
    ``down`` is read as ``[F, D]``. The sums over a program's neurons stay in registers and go to
    ``partial[program]``, ``[BATCH, D]``, float32.
    """
    if DEPENDENT:
        # before any load: the previous kernel may write the weights
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK_D)
    in_row = columns < D
    xs = ()
    sums = ()
    for b in tl.static_range(BATCH):
        xs = xs + (tl.load(x + b * D + columns, mask=in_row, other=0),)
        sums = sums + (tl.zeros([BLOCK_D], tl.float32),)

    rows = program * ROWS + tl.arange(0, ROWS)
    if routed_sums is None:
        tile = load_rows(routing, rows, rows < F, D, BLOCK_D)
    for _ in range(program * ROWS, F, programs * ROWS):
        exists = rows < F
        threshold = tl.load(thresholds + rows, mask=exists, other=0)
        routed = ()
        keeps = ()
        needed = exists & False
        for b in tl.static_range(BATCH):
            if routed_sums is None:
                r = dot_rows(tile, xs[b], routing_bias, rows, exists)
            else:
                r = tl.load(routed_sums + b * F + rows, mask=exists, other=0)
                if routing_bias is not None:
                    r += tl.load(routing_bias + rows, mask=exists, other=0).to(tl.float32)
            if GATE_ROUTES:
                r = activate(r, ACTIVATION)
            # kept and not an exact zero, which adds nothing; NaN is kept
            keep = exists & ~(tl.abs(r) < threshold) & (r != 0)
            routed = routed + (r,)
            keeps = keeps + (keep,)
            needed = needed | keep

        # requested now, used in the next round: it arrives while this round waits for its neurons
        next_rows = rows + programs * ROWS
        if routed_sums is None:
            tile = load_rows(routing, next_rows, next_rows < F, D, BLOCK_D)

        if tl.max(needed.to(tl.int32), axis=0) > 0:
            other_tile = load_rows(other, rows, needed, D, BLOCK_D)
            if product_thresholds is None:
                # a kept neuron needs both, so both are requested at once
                down_tile = load_rows(down, rows, needed, D, BLOCK_D)
            products = ()
            column_needed = needed & False
            for b in tl.static_range(BATCH):
                o = dot_rows(other_tile, xs[b], other_bias, rows, needed)
                if not GATE_ROUTES:
                    o = activate(o, ACTIVATION)
                h = tl.where(keeps[b], routed[b] * o, 0)
                if product_thresholds is not None:
                    t = tl.load(product_thresholds + rows, mask=exists, other=0)
                    h = tl.where(tl.abs(h) < t, 0, h)
                products = products + (h,)
                column_needed = column_needed | (h != 0)
            if product_thresholds is not None:
                down_tile = load_rows(down, rows, column_needed, D, BLOCK_D)
            # a column that no token needs counts as 0, whatever it holds
            weights = tl.where(column_needed[:, None], down_tile.to(tl.float32), 0)
            new_sums = ()
            for b in tl.static_range(BATCH):
                new_sums = new_sums + (sums[b] + tl.sum(weights * products[b][:, None], axis=0),)
            sums = new_sums
        rows = next_rows

    for b in tl.static_range(BATCH):
        # int64: programs * BATCH * D may pass 2**31
        start = partial + (program.to(tl.int64) * BATCH + b) * D
        tl.store(start + columns, sums[b], mask=in_row)


@triton.jit
def add_partials(
    partial,
    bias,
    out,
    programs,
    D,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """``out[b] = sum over programs of partial[:, b] + bias``, in a fixed order."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    b = tl.program_id(1)
    in_row = columns < D
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(0, programs, ROWS):
        rows = first + tl.arange(0, ROWS)
        offsets = (rows.to(tl.int64) * BATCH + b)[:, None] * D + columns[None, :]
        mask = (rows < programs)[:, None] & in_row[None, :]
        total += tl.load(partial + offsets, mask=mask, other=0)
    y = tl.sum(total, axis=0)
    if bias is not None:
        y += tl.load(bias + columns, mask=in_row, other=0).to(tl.float32)
    tl.store(out + b * D + columns, y.to(out.dtype.element_ty), mask=in_row)
