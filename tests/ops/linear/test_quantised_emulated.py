"""The CUDA kernel of quantised linear layers on a CPU, by an emulator."""

import pytest
import torch

from cats.benchmarks.timing import Timing
from cats.errors import ShapeError, UnsupportedModelError
from cats.ops.cuda.arguments import address
from cats.ops.cuda.residual import Residual
from cats.ops.quantised.rows import PackedRows, ZeroMode, pack_rows
from tests.ops.emulator import EmulatedFunction, emulated_kernels, imagine_gpu, needs_emulator
from tests.ops.linear.quantised_cases import (
    Matrix,
    columns_nearby,
    error_bound,
    make_layout,
    make_matrix,
)

pytestmark = needs_emulator
CONSTANT, ZEROS, SHIFTS = ZeroMode
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture
def linear(monkeypatch):
    """Launches on an imaginary GPU of two multiprocessors."""
    from cats.ops.linear import quantised

    imagine_gpu(monkeypatch, multiprocessors=2, shared_bytes=100 * 1024)
    with emulated_kernels(monkeypatch):
        yield quantised


def run(linear, matrices, x, *, dtype=F32, biases=None, rows_of_chunk=None, chunks=None, **options):
    """The output, float64; ``rows_of_chunk`` and ``chunks`` as on a GPU with other memory."""
    out = torch.full((sum(matrix.packed.count for matrix in matrices),), torch.nan)
    packed = [matrix.packed for matrix in matrices]
    if rows_of_chunk or chunks:
        ring = linear._ring
        linear._ring = lambda *a: (rows_of_chunk or ring(*a)[0], chunks or ring(*a)[1])
    try:
        launch = linear.launch(
            packed, biases or [None] * len(packed), x=x, dtype=dtype, out=out,
            multiprocessors=2, **options,
        )  # fmt: skip
    finally:
        if rows_of_chunk or chunks:
            linear._ring = ring
    launch.function.launch(launch.arguments, blocks=launch.blocks, stream=0, dependent=True)
    return out.double()


def check(out, matrices, x, added=0.0):
    values = torch.cat([matrix.values for matrix in matrices])
    x = x.double()
    error = (out - (values @ x + added)).abs()
    bound = error_bound(values, x)
    assert (error <= bound).all(), f"{(error / bound).max()} of what rounding explains"


@pytest.mark.parametrize(
    ("bits", "columns", "rows", "group_size", "zero_mode", "scale_dtype"),
    [
        (4, 1024, 35, 128, CONSTANT, F16),
        (4, 2176, 35, 128, ZEROS, F16),  # 17 units: a warp with two of three, some without any
        (4, 300, 20, 64, SHIFTS, BF16),
        (4, 1001, 33, 32, ZEROS, F32),
        (4, 300, 17, 32, SHIFTS, F16),
        (4, 129, 16, 0, CONSTANT, F32),
        (4, 5000, 5, 0, SHIFTS, BF16),
        (4, 1, 1, 64, ZEROS, F16),
        (8, 4096, 20, 0, CONSTANT, F32),
        (8, 601, 19, 0, ZEROS, F16),
        (8, 1000, 9, 128, CONSTANT, BF16),
        (8, 3100, 9, 128, SHIFTS, F16),
        (8, 321, 7, 64, ZEROS, F32),
        (8, 700, 11, 32, SHIFTS, F32),
        (8, 63, 3, 32, CONSTANT, BF16),
    ],
)
def test_product_is_that_of_the_dequantised_matrix(
    linear, bits, columns, rows, group_size, zero_mode, scale_dtype
):
    layout = make_layout(bits, columns, group_size, zero_mode, scale_dtype)
    matrix, x = make_matrix(layout, rows), torch.randn(columns)
    check(run(linear, [matrix], x), [matrix], x)


@pytest.mark.parametrize("rows_of_chunk", [4, 8, 16])
@pytest.mark.parametrize(
    ("bits", "group_size", "columns"), [(4, 64, 1700), (8, 128, 900), (8, 0, 640)]
)
def test_chunks_of_fewer_rows_fold_the_products(linear, bits, group_size, columns, rows_of_chunk):
    layout = make_layout(bits, columns, group_size)
    matrix, x = make_matrix(layout, 50), torch.randn(columns)
    out = run(linear, [matrix], x, rows_of_chunk=rows_of_chunk, chunks=2)
    check(out, [matrix], x)


@pytest.mark.parametrize(("bits", "dtype"), [(4, BF16), (8, F16), (4, F32)])
@pytest.mark.parametrize("counted", [False, True])
def test_three_matrices_are_one_list_of_rows(linear, bits, dtype, counted):
    layout = make_layout(bits, 256, 128)
    matrices = [make_matrix(layout, rows) for rows in (201, 37, 90)]
    biases = [torch.randn(201).to(dtype), None, torch.randn(90).to(dtype)]
    x, add, copy = torch.randn(256).to(dtype), torch.randn(328), torch.full((328,), torch.nan)
    counter = torch.zeros(1, dtype=torch.int32) if counted else None
    out = run(
        linear, matrices, x, dtype=dtype, biases=biases, add=add, copy=copy, counter=counter,
        chunks=3,
    )  # fmt: skip
    added = torch.cat([biases[0], torch.zeros(37, dtype=dtype), biases[2]]).double() + add
    check(out, matrices, x, added)
    assert torch.equal(copy.double(), out)
    assert not counted or counter.item() > 0


def test_copy_is_zeroed_where_nothing_is_added(linear):
    matrix, x = make_matrix(make_layout(4, 130, 32), 5), torch.randn(130)
    copy = torch.full((5,), torch.nan)
    check(run(linear, [matrix], x, copy=copy, early=False), [matrix], x)
    assert not copy.any()


@pytest.mark.parametrize(("bits", "columns", "dtype"), [(4, 520, BF16), (8, 1032, F32)])
@pytest.mark.parametrize("with_delta", [False, True])
def test_input_is_the_norm_of_the_residual_stream(linear, bits, columns, dtype, with_delta):
    matrix = make_matrix(make_layout(bits, columns, 64), 21)
    base, delta, total = 3 * torch.randn(columns), torch.randn(columns), torch.zeros(columns)
    weight, delta_weight = torch.rand(columns).to(dtype), torch.rand(columns).to(dtype)
    residual = Residual(base=address(base), weight=address(weight), epsilon=1e-5, weight_offset=1)

    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean() + 1e-5) * (1 + weight.double())

    x = base.double()
    if with_delta:
        residual.delta, residual.delta_weight = address(delta), address(delta_weight)
        residual.sum = address(total)
        x = x + norm(delta.double(), delta_weight)
    out = run(linear, [matrix], residual, dtype=dtype)
    if with_delta:
        torch.testing.assert_close(total.double(), x, rtol=1e-5, atol=1e-5)
    check(out, [matrix], norm(x, weight))


@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (4, 0), (8, 32), (8, 0)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_input_that_is_not_finite_shows_in_all_rows(linear, bits, group_size, bad):
    matrix, x = make_matrix(make_layout(bits, 600, group_size), 9), torch.randn(600)
    x[431] = bad
    assert not run(linear, [matrix], x).isfinite().any()


@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (4, 0), (8, 32), (8, 0)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_scale_that_is_not_finite_shows_in_its_row_alone(linear, bits, group_size, bad):
    layout = make_layout(bits, 600, group_size)
    scales = (torch.rand(20, layout.groups) / 100).half()
    scales[13, -1] = bad
    matrix, x = make_matrix(layout, 20, scales=scales), torch.randn(600)
    out = run(linear, [matrix], x)
    assert not out[13].isfinite()
    matrix.values[13] = out[13] = 0
    check(out, [matrix], x)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 0)])
def test_scales_and_inputs_of_zero_give_zeros(linear, bits, group_size):
    layout = make_layout(bits, 200, group_size)
    scales = torch.zeros(6, layout.groups).half()
    matrix = make_matrix(layout, 6, scales=scales)
    assert not run(linear, [matrix], torch.randn(200)).any()
    assert not run(linear, [make_matrix(layout, 6)], torch.zeros(200)).any()


@pytest.mark.parametrize(("bits", "zero"), [(4, 0), (4, 15), (8, 0), (8, 255)])
@pytest.mark.parametrize("group_size", [0, 128])
def test_codes_and_zero_points_at_their_ends_do_not_overflow(linear, bits, zero, group_size):
    columns = 4096 if bits == 4 else 2048
    layout = make_layout(bits, columns, group_size, ZEROS)
    codes = 255 if zero == 0 else 0
    stored = torch.full((4, columns * bits // 8), codes, dtype=torch.uint8)
    shape = 4, layout.groups
    packed = pack_rows(
        layout, stored, torch.ones(shape).half(),
        zeros=torch.full(shape, zero, dtype=torch.uint8),
    )  # fmt: skip
    value = (2**bits - 1) * (1.0 if zero == 0 else -1.0)
    values = torch.full((4, columns), value, dtype=torch.float64)
    for x in (torch.ones(columns), -torch.ones(columns)):
        out = run(linear, [Matrix(PackedRows(packed, layout, 4), values)], x)
        torch.testing.assert_close(out, values @ x.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (8, 0)])
def test_an_outlier_channel_costs_precision_only_nearby(linear, bits, group_size):
    layout = make_layout(bits, 4096, group_size)
    matrix, x = make_matrix(layout, 16), torch.randn(4096)
    nearby = columns_nearby(layout)
    outlier = 10 * nearby + 5
    x[outlier] = 1000
    values = matrix.values.clone()
    values[:, outlier] = 0
    quiet = x.clone()
    quiet[outlier] = 0
    # the channel's own product is exact, for it is the largest; so the rest can be seen
    out = run(linear, [matrix], x) - matrix.values[:, outlier] * 1000
    error = (out - values @ quiet.double()).abs()
    largest = torch.full((4096,), quiet.abs().max().item(), dtype=torch.float64)
    largest[10 * nearby : 11 * nearby] = 1000
    assert (error <= error_bound(values, x.double(), largest)).all()
    # bfloat16 rounds the outlier itself by up to 2, this rounds each neighbour by up to 0.016
    exact = (values @ quiet.double()).square().mean().sqrt()
    assert error.square().mean().sqrt() < 0.003 * exact


@pytest.mark.parametrize("scale", [1e-20, 1e-36, 1e20])
def test_inputs_far_from_one_keep_their_precision_or_vanish(linear, scale):
    matrix = make_matrix(make_layout(8, 300, 0, scale_dtype=F32), 8)
    x = torch.randn(300) * scale
    out = run(linear, [matrix], x)
    if scale == 1e-36:
        assert (out.abs() < 1e-34).all()
    else:
        torch.testing.assert_close(out, matrix.values @ x.double(), rtol=1e-3, atol=1e-4 * scale)


def test_matrices_of_two_layouts_are_refused(linear):
    matrices = [make_matrix(make_layout(4, 64, group), 3) for group in (32, 64)]
    with pytest.raises(ShapeError, match="launch them one by one"):
        run(linear, matrices, torch.zeros(64))


def test_a_residual_stream_that_is_not_aligned_is_refused(linear):
    matrix = make_matrix(make_layout(4, 60, 32), 3)
    with pytest.raises(UnsupportedModelError, match="multiple of 16 bytes"):
        run(linear, [matrix], Residual(), dtype=BF16)


def test_rows_that_do_not_fit_are_refused(linear):
    matrix = make_matrix(make_layout(8, 40000, 0), 1)
    with pytest.raises(UnsupportedModelError, match="too long"):
        run(linear, [matrix], torch.zeros(40000))


def test_a_wait_for_ever_is_reported(linear):
    matrix, x, out = make_matrix(make_layout(8, 64, 0), 4), torch.ones(64), torch.zeros(4)
    launch = linear.launch([matrix.packed], [None], x=x, dtype=F32, out=out, multiprocessors=1)
    function = EmulatedFunction(
        0, "linear/quantised.cu", launch.function.defines,
        threads=launch.function.threads - 64,  # without the copier
        shared_bytes=launch.function.shared_bytes,
    )  # fmt: skip
    with pytest.raises(AssertionError, match="wait for ever"):
        function.launch(launch.arguments, blocks=1, stream=0, dependent=False)


def test_times_of_both_ways_to_deal_rows_out(linear, monkeypatch):
    from tests.ops.linear import time_quantised

    monkeypatch.setattr(time_quantised, "read_bandwidth", lambda *a, **k: Timing.once(1e-3))
    bench = time_quantised.Bench(
        torch.device("cpu"), rounds=2, chain=2, rotated_bytes=10_000, read_bytes=1000
    )
    shape = time_quantised.Shape("tiny", (20, 5), 64, True)
    lines = list(bench.measure(shape, time_quantised.Format(4, 32)))
    lines.append(bench.measure_bfloat16(shape))
    assert [line.get("counter") for line in lines] == [False, True, None]
    assert all(line["us"] > 0 and line["share"] > 0 for line in lines)
