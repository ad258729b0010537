"""The CUDA kernel of quantised linear layers on a CPU, by an emulator."""

import pytest
import torch

from cats.benchmarks.timing import Timing
from cats.errors import ShapeError, UnsupportedModelError
from cats.ops.cuda.arguments import address
from cats.ops.cuda.residual import Residual
from cats.ops.quantised.rows import PackedRows, ZeroMode, pack_rows
from cats.weights.quantised import packed
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

# Each set of macros is one run of the compiler, so tests share these layouts. Of so many rows, two
# multiprocessors get one chunk each, and the second one is not full.
ROWS = {4: 29, 8: 15}
LAYOUTS = {
    "int4, rows of long shares": make_layout(4, 4300, 0, ZEROS, BF16),
    # a warp with fewer columns than the others, and one without any
    "int4, groups of 128": make_layout(4, 4300, 128, ZEROS, F16),
    "int4, groups of 64": make_layout(4, 300, 64, SHIFTS, BF16),
    "int4, groups of 32": make_layout(4, 1001, 32, ZEROS, F32),
    "int4, rows": make_layout(4, 129, 0, SHIFTS, F32),
    "int4, a column": make_layout(4, 1, 64, ZEROS, F16),
    "int8, rows of long shares": make_layout(8, 4096, 0, CONSTANT, F32),
    "int8, groups of 128": make_layout(8, 1000, 128, ZEROS, BF16),
    "int8, groups of 64": make_layout(8, 3100, 64, SHIFTS, F16),
    "int8, groups of 32": make_layout(8, 700, 32, SHIFTS, F32),
    "int8, rows": make_layout(8, 601, 0, ZEROS, F16),
    "int8, less than a unit": make_layout(8, 63, 32, CONSTANT, BF16),
}
SMALL = ["int4, groups of 64", "int4, rows", "int8, groups of 32", "int8, rows"]
WITH_ZEROS = [name for name, layout in LAYOUTS.items() if layout.zero_mode == ZEROS]


@pytest.fixture
def linear(monkeypatch):
    """Launches on an imaginary GPU of two multiprocessors."""
    from cats.ops.linear import quantised

    imagine_gpu(monkeypatch, multiprocessors=2, shared_bytes=100 * 1024)
    with emulated_kernels(monkeypatch):
        yield quantised


def prepare(linear, matrices, x, *, dtype=F32, biases=None, multiprocessors=2, **options):
    """A launch, and its output."""
    packed = [matrix.packed for matrix in matrices]
    out = torch.full((sum(rows.count for rows in packed),), torch.nan)
    options |= dict(x=x, dtype=dtype, out=out, multiprocessors=multiprocessors)
    return linear.launch(packed, biases or [None] * len(packed), **options), out


def run(linear, matrices, x, **options):
    """The output, float64."""
    launch, out = prepare(linear, matrices, x, **options)
    launch.function.launch(launch.arguments, blocks=launch.blocks, stream=0, dependent=True)
    return out.double()


def check(out, matrices, x, added=0.0):
    values = torch.cat([matrix.values for matrix in matrices])
    x = x.double()
    error = (out - (values @ x + added)).abs()
    bound = error_bound(values, x)
    assert (error <= bound).all(), f"{(error / bound).max()} of what rounding explains"


def matrix_of(layout, **options):
    return make_matrix(layout, ROWS[layout.bits], **options)


@pytest.mark.parametrize("name", LAYOUTS)
def test_product_is_that_of_the_dequantised_matrix(linear, name):
    matrix, x = matrix_of(LAYOUTS[name]), torch.randn(LAYOUTS[name].columns)
    check(run(linear, [matrix], x), [matrix], x)


def test_a_matrix_may_have_one_row(linear):
    matrix, x = make_matrix(LAYOUTS["int4, a column"], 1), torch.randn(1)
    check(run(linear, [matrix], x), [matrix], x)


@pytest.mark.parametrize(
    ("bits", "group_size", "columns", "shared_kib", "rows_of_chunk", "chunks"),
    [
        (4, 64, 600, 39, 8, 4),
        (4, 64, 600, 33, 4, 5),
        (8, 128, 600, 36, 4, 4),
        (8, 0, 640, 6, 4, 1),
    ],
)
def test_gpus_with_less_memory_fold_the_products_and_use_shorter_rings(
    linear, monkeypatch, bits, group_size, columns, shared_kib, rows_of_chunk, chunks
):
    imagine_gpu(monkeypatch, multiprocessors=2, shared_bytes=1024 * shared_kib)
    matrix, x = make_matrix(make_layout(bits, columns, group_size), 50), torch.randn(columns)
    launch, _ = prepare(linear, [matrix], x)
    defines = launch.function.defines
    assert (defines["ROWS_OF_CHUNK"], defines["CHUNKS"]) == (rows_of_chunk, chunks)
    check(run(linear, [matrix], x), [matrix], x)


@pytest.mark.parametrize(("bits", "dtype"), [(4, BF16), (8, F16)])
@pytest.mark.parametrize("counted", [False, True])
def test_three_matrices_are_one_list_of_rows(linear, bits, dtype, counted):
    layout = make_layout(bits, 256, 128)
    matrices = [make_matrix(layout, rows) for rows in (201, 37, 90)]
    biases = [torch.randn(201).to(dtype), None, torch.randn(90).to(dtype)]
    x, add, copy = torch.randn(256).to(dtype), torch.randn(328), torch.full((328,), torch.nan)
    counter = torch.zeros(1, dtype=torch.int32) if counted else None
    options = dict(dtype=dtype, biases=biases, add=add, copy=copy, counter=counter)
    out = run(linear, matrices, x, **options)
    added = torch.cat([biases[0], torch.zeros(37, dtype=dtype), biases[2]]).double() + add
    check(out, matrices, x, added)
    assert torch.equal(copy.double(), out)
    assert not counted or counter.item() > 0


def test_copy_is_zeroed_where_nothing_is_added(linear):
    matrix, x = matrix_of(LAYOUTS["int4, rows"]), torch.randn(129)
    copy = torch.full((len(matrix.values),), torch.nan)
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


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_input_that_is_not_finite_shows_in_all_rows(linear, name, bad):
    matrix, x = matrix_of(LAYOUTS[name]), torch.randn(LAYOUTS[name].columns)
    x[len(x) * 2 // 3] = bad
    assert not run(linear, [matrix], x).isfinite().any()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_scale_that_is_not_finite_shows_in_its_row_alone(linear, name, bad):
    layout = LAYOUTS[name]
    scales = (torch.rand(ROWS[layout.bits], layout.groups) / 100).to(layout.scale_dtype)
    scales[13, -1] = bad
    matrix, x = matrix_of(layout, scales=scales), torch.randn(layout.columns)
    out = run(linear, [matrix], x)
    assert not out[13].isfinite()
    matrix.values[13] = out[13] = 0
    check(out, [matrix], x)


@pytest.mark.parametrize("name", WITH_ZEROS)
def test_scales_and_inputs_of_zero_give_zeros(linear, name):
    layout = LAYOUTS[name]
    scales = torch.zeros(ROWS[layout.bits], layout.groups).to(layout.scale_dtype)
    x = torch.randn(layout.columns)
    assert not run(linear, [matrix_of(layout, scales=scales)], x).any()
    assert not run(linear, [matrix_of(layout)], torch.zeros(layout.columns)).any()


@pytest.mark.parametrize("is_lowest", [True, False])
@pytest.mark.parametrize("name", WITH_ZEROS)
def test_codes_and_zero_points_at_their_ends_do_not_overflow(linear, name, is_lowest):
    layout, rows = LAYOUTS[name], ROWS[LAYOUTS[name].bits]
    largest = 2**layout.bits - 1
    zero, code, value = (0, largest, largest) if is_lowest else (largest, 0, -largest)
    codes = torch.full((rows, layout.columns), code, dtype=torch.uint8)
    table = rows, layout.groups
    data = pack_rows(
        layout,
        codes if layout.bits == 8 else packed(codes),
        torch.ones(table, dtype=layout.scale_dtype),
        zeros=torch.full(table, zero, dtype=torch.uint8),
    )
    matrix = Matrix(PackedRows(data, layout, rows), torch.full(codes.shape, float(value)).double())
    for x in (torch.ones(layout.columns), -torch.ones(layout.columns)):
        out = run(linear, [matrix], x)
        torch.testing.assert_close(out, matrix.values @ x.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "layout", [make_layout(4, 4096, 128), LAYOUTS["int8, rows of long shares"]]
)
def test_an_outlier_channel_costs_precision_only_nearby(linear, layout):
    matrix, x = matrix_of(layout), torch.randn(4096)
    nearby = columns_nearby(layout)
    outlier = 10 * nearby + 5
    x[outlier] = 1000
    values = matrix.values.clone()
    values[:, outlier] = 0
    quiet = x.clone()
    quiet[outlier] = 0
    # the outlier is the largest value, so its own product is exact and can be subtracted
    out = run(linear, [matrix], x) - matrix.values[:, outlier] * 1000
    error = (out - values @ quiet.double()).abs()
    largest = torch.full((4096,), quiet.abs().max().item(), dtype=torch.float64)
    largest[10 * nearby : 11 * nearby] = 1000
    assert (error <= error_bound(values, x.double(), largest)).all()
    # bfloat16 moves the outlier itself by up to 2; fixed point moves each neighbour by up to 0.016
    exact = (values @ quiet.double()).square().mean().sqrt()
    assert error.square().mean().sqrt() < 0.003 * exact


@pytest.mark.parametrize("scale", [1e-20, 1e-36, 1e20])
def test_inputs_far_from_one_keep_their_precision_or_vanish(linear, scale):
    matrix, x = matrix_of(LAYOUTS["int8, rows"]), torch.randn(601) * scale
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
    layout = LAYOUTS["int8, rows"]
    launch, _ = prepare(linear, [matrix_of(layout)], torch.ones(layout.columns), multiprocessors=1)
    function = EmulatedFunction(
        0,
        "linear/quantised.cu",
        launch.function.defines,
        threads=launch.function.threads - 64,  # without the copier
        shared_bytes=launch.function.shared_bytes,
    )
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
