"""The CUDA kernel of quantised linear layers: compiled for each GPU, and run on one."""

import pytest
import torch

from cats.ops.cuda.arguments import address
from cats.ops.cuda.residual import Residual
from cats.ops.quantised.rows import ZeroMode
from tests.ops.cases import needs_nvrtc
from tests.ops.linear.quantised_cases import (
    SHARED,
    columns_nearby,
    error_bound,
    make_layout,
    make_matrix,
)
from tests.thorough import usual

CONSTANT, ZEROS, SHIFTS = ZeroMode
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# Rows of a chunk, by the bits of a code.
MOST_ROWS = {4: 16, 8: 8}


@needs_nvrtc
@pytest.mark.parametrize("capability", usual(SHARED, [(8, 0), (9, 0)]))
@pytest.mark.parametrize(
    ("bits", "columns", "group_size", "zero_mode", "scale_dtype", "dtype", "normed"),
    [
        (4, 4096, 128, CONSTANT, F16, BF16, True),
        (4, 3001, 32, SHIFTS, BF16, F16, False),
        (8, 14336, 0, CONSTANT, F32, F32, False),
        (8, 576, 128, ZEROS, F16, BF16, True),
    ],
)
def test_each_kind_compiles_for_each_generation(
    tmp_path,
    monkeypatch,
    capability,
    bits,
    columns,
    group_size,
    zero_mode,
    scale_dtype,
    dtype,
    normed,
):
    from cats.ops.cuda.compiler import compile_kernel
    from cats.ops.linear import quantised

    monkeypatch.setenv("CATS_CACHE_DIR", str(tmp_path))
    layout = make_layout(bits, columns, group_size, zero_mode, scale_dtype)
    limit = 1024 * SHARED[capability]
    macros = quantised.macros(
        layout, dtype=dtype, normed=normed, most_rows=MOST_ROWS[bits], shared_limit=limit
    )
    assert macros["SHARED_BYTES"] <= limit
    assert compile_kernel("linear/quantised.cu", macros, capability)[:4] == b"\x7fELF"


@pytest.mark.parametrize("columns", [1, 64, 576, 4096, 11008, 14336, 18944, 28672])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_large_models_fit_into_the_shared_memory(bits, columns):
    from cats.ops.linear import quantised

    layout = make_layout(bits, columns, 0)
    limit = 227 * 1024
    macros = quantised.macros(
        layout, dtype=BF16, normed=False, most_rows=MOST_ROWS[bits], shared_limit=limit
    )
    assert macros["SHARED_BYTES"] <= limit
    # one chunk arrives while another is used; the longest rows leave room for one chunk only
    assert macros["CHUNKS"] >= (2 if columns < 28672 or bits == 4 else 1)


def run(matrices, x, *, dtype, biases=None, **options):
    """The output, float64."""
    from cats.ops.cuda.device import multiprocessors
    from cats.ops.linear import quantised

    packed = [matrix.packed for matrix in matrices]
    out = torch.full((sum(rows.count for rows in packed),), torch.nan, device="cuda")
    options |= dict(x=x, dtype=dtype, out=out, multiprocessors=multiprocessors(0))
    launch = quantised.launch(packed, biases or [None] * len(packed), **options)
    stream = torch.cuda.current_stream().cuda_stream
    launch.function.launch(launch.arguments, blocks=launch.blocks, stream=stream, dependent=False)
    return out.double()


def check(out, matrices, x, added=0.0):
    values = torch.cat([matrix.values for matrix in matrices])
    x = x.double()
    error = (out - (values @ x + added)).abs()
    bound = error_bound(values, x)
    assert (error <= bound).all(), f"{(error / bound).max()} of what rounding explains"


@needs_gpu
@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (4096, 14336), (14336, 4096)])
@pytest.mark.parametrize(
    ("bits", "group_size", "zero_mode", "scale_dtype"),
    [
        (4, 128, CONSTANT, F16),
        (4, 128, ZEROS, BF16),
        (4, 64, SHIFTS, F32),
        (4, 32, SHIFTS, F16),
        (4, 0, CONSTANT, F32),
        (8, 0, CONSTANT, F32),
        (8, 128, CONSTANT, BF16),
        (8, 32, ZEROS, F16),
    ],
)
@pytest.mark.parametrize("counted", [False, True])
def test_product_is_that_of_the_dequantised_matrix(
    rows, columns, bits, group_size, zero_mode, scale_dtype, counted
):
    layout = make_layout(bits, columns, group_size, zero_mode, scale_dtype)
    matrix = make_matrix(layout, rows, device="cuda")
    x = torch.randn(columns, device="cuda").bfloat16()
    counter = torch.zeros(1, dtype=torch.int32, device="cuda") if counted else None
    check(run([matrix], x, dtype=BF16, counter=counter), [matrix], x)


@needs_gpu
@pytest.mark.parametrize("columns", [1, 127, 576, 1001, 3584, 11008, 28672])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (4, 32), (8, 0), (8, 128)])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_widths_of_all_kinds(columns, bits, group_size, dtype):
    matrix = make_matrix(make_layout(bits, columns, group_size), 1003, device="cuda")
    x = torch.randn(columns, device="cuda").to(dtype)
    check(run([matrix], x, dtype=dtype), [matrix], x)


@needs_gpu
@pytest.mark.parametrize(("bits", "group_size", "dtype"), [(4, 128, BF16), (8, 0, F16)])
@pytest.mark.parametrize("counted", [False, True])
def test_three_matrices_are_one_list_of_rows(bits, group_size, dtype, counted):
    counts = 4097, 1024, 1031
    layout = make_layout(bits, 4096, group_size)
    matrices = [make_matrix(layout, rows, device="cuda") for rows in counts]
    biases = [torch.randn(rows, device="cuda").to(dtype) for rows in counts]
    biases[1] = None
    x = torch.randn(4096, device="cuda").to(dtype)
    add, copy = torch.randn(sum(counts), device="cuda"), torch.zeros(sum(counts), device="cuda")
    counter = torch.zeros(1, dtype=torch.int32, device="cuda") if counted else None
    out = run(matrices, x, dtype=dtype, biases=biases, add=add, copy=copy, counter=counter)
    nothing = torch.zeros(counts[1], device="cuda", dtype=dtype)
    check(out, matrices, x, torch.cat([biases[0], nothing, biases[2]]).double() + add)
    assert torch.equal(copy.double(), out)


@needs_gpu
@pytest.mark.parametrize(("bits", "columns"), [(4, 4096), (8, 4096), (4, 576), (8, 16384)])
def test_input_is_the_norm_of_the_residual_stream(bits, columns):
    matrix = make_matrix(make_layout(bits, columns, 64), 300, device="cuda")
    base = 3 * torch.randn(columns, device="cuda")
    weight = torch.rand(columns, device="cuda").bfloat16()
    residual = Residual(base=address(base), weight=address(weight), epsilon=1e-5)
    x = base.double() * torch.rsqrt(base.double().square().mean() + 1e-5) * weight.double()
    check(run([matrix], residual, dtype=BF16), [matrix], x)


@needs_gpu
@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (8, 0)])
def test_what_is_not_finite_shows_where_it_belongs(bits, group_size):
    layout = make_layout(bits, 4096, group_size)
    scales = (torch.rand(400, layout.groups, device="cuda") / 100).half()
    scales[77, -1], scales[300, 0] = torch.nan, torch.inf
    matrix = make_matrix(layout, 400, scales=scales, device="cuda")
    x = torch.randn(4096, device="cuda").bfloat16()
    out = run([matrix], x, dtype=BF16)
    for row in (77, 300):
        assert not out[row].isfinite()
        matrix.values[row] = out[row] = 0
    check(out, [matrix], x)
    for bad in (torch.nan, torch.inf):
        x[4000] = bad
        assert not run([matrix], x, dtype=BF16).isfinite().any()


@needs_gpu
@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (8, 0)])
def test_an_outlier_channel_costs_precision_only_nearby(bits, group_size):
    layout = make_layout(bits, 4096, group_size)
    matrix = make_matrix(layout, 4096, device="cuda")
    x = torch.randn(4096, device="cuda")
    nearby = columns_nearby(layout)
    outlier = 10 * nearby + 5
    x[outlier] = 1000
    out = run([matrix], x, dtype=F32) - matrix.values[:, outlier] * 1000
    matrix.values[:, outlier] = 0
    largest = torch.full_like(x, x.abs().sort().values[-2].item())
    largest[10 * nearby : 11 * nearby] = 1000
    error = (out - matrix.values @ x.double()).abs()
    # sums in float32 also round the products of the outlier
    allowed = error_bound(matrix.values, x.double(), largest.double()) + 1e-6 * 1000 / 64
    assert (error <= allowed).all()


@needs_gpu
def test_launches_of_a_graph_see_what_the_launch_before_them_wrote():
    """Each adds to the output of the launch before it, and starts early."""
    from cats.ops.cuda.device import multiprocessors
    from cats.ops.linear import quantised

    layout, count = make_layout(4, 4096, 128), 12
    matrices = [make_matrix(layout, 4096, device="cuda") for _ in range(count)]
    weight = torch.ones(4096, device="cuda").bfloat16()
    stream = torch.randn(4096, device="cuda")
    buffers = [stream, *(torch.full_like(stream, torch.nan) for _ in range(count))]
    counters = torch.zeros(count, dtype=torch.int32, device="cuda")
    options = dict(dtype=BF16, multiprocessors=multiprocessors(0))
    launches = []
    for i, matrix in enumerate(matrices):
        before, after = buffers[i : i + 2]
        options |= dict(add=before, out=after, counter=counters[i : i + 1] if i % 2 else None)
        x = Residual(base=address(before), weight=address(weight), epsilon=1e-5)
        launches.append(quantised.launch([matrix.packed], [None], x=x, **options))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counters.zero_()
        handle = torch.cuda.current_stream().cuda_stream
        for i, launch in enumerate(launches):
            launch.function.launch(
                launch.arguments, blocks=launch.blocks, stream=handle, dependent=i > 0
            )
    for _ in range(50):
        graph.replay()
    for i, matrix in enumerate(matrices):
        before = buffers[i].double()
        x = before * torch.rsqrt(before.square().mean() + 1e-5)
        check(buffers[i + 1].double(), [matrix], x, before)
