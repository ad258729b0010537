import shutil
import time

import pytest
import torch

from cats.errors import BackendError
from cats.functional import ACTIVATIONS
from cats.ops import GatedMLPArguments
from cats.ops.mlp import cuda
from cats.ops.mlp.cuda.arguments import MLPArguments
from cats.ops.mlp.cuda.variant import Variant, variant_for
from tests.ops import sanitize_cuda
from tests.ops.cases import (
    TOLERANCE,
    Inputs,
    make_inputs,
    needs_nvrtc,
    reference_in_double,
    skip_unavailable,
)
from tests.thorough import usual

SOURCE = "mlp/cuda/gated_mlp.cu"
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# KiB of shared memory per block, by compute capability (CUDA programming guide).
SHARED = dict.fromkeys([(8, 0), (8, 7)], 163)
SHARED |= dict.fromkeys([(8, 6), (8, 9), (12, 0), (12, 1)], 99)
SHARED |= dict.fromkeys([(9, 0), (10, 0), (10, 3)], 227)
CAPABILITIES = [pytest.param(c, id=f"sm_{c[0]}{c[1]}") for c in SHARED]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CATS_CACHE_DIR", str(tmp_path))


def variant(D: int, dtype=BF16, batch=1, activation="silu", capability=(9, 0)) -> Variant:
    limit = 1024 * SHARED[capability]
    chosen = variant_for(D, dtype, batch, activation, shared_limit=limit)
    assert chosen is not None
    return chosen


# --- without a GPU


@needs_nvrtc
@pytest.mark.parametrize("capability", usual(SHARED, [(8, 0), (9, 0), (12, 0)]))
def test_each_dtype_and_batch_compiles_for_each_generation(capability):
    from cats.ops.cuda.compiler import compile_kernel

    names = list(ACTIVATIONS)
    for i, (dtype, batch) in enumerate((d, b) for d in (BF16, F16, F32) for b in (1, 2)):
        chosen = variant(40, dtype, batch, names[i % len(names)], capability)
        assert compile_kernel(SOURCE, chosen.defines(), capability)[:4] == b"\x7fELF"


@needs_nvrtc
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("capability", usual([(8, 0), (9, 0)], [(9, 0)]))
def test_each_activation_compiles(activation, capability):
    from cats.ops.cuda.compiler import compile_kernel

    assert compile_kernel(
        SOURCE,
        variant(40, activation=activation, capability=capability).defines(),
        capability,
    )


@needs_nvrtc
@pytest.mark.parametrize("D", [576, 2048, 4096, 8192, 16384])
@pytest.mark.parametrize("capability", usual([(8, 0), (9, 0)], [(9, 0)]))
def test_widths_of_models_compile(D, capability):
    from cats.ops.cuda.compiler import compile_kernel

    assert compile_kernel(SOURCE, variant(D, capability=capability).defines(), capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("batch", [1, 2])
def test_variants_fit_the_shared_memory(capability, dtype, batch):
    limit = 1024 * SHARED[capability]
    for D in range(8, 16384 // dtype.itemsize * 2 + 1, 8):
        chosen = variant_for(D, dtype, batch, "silu", shared_limit=limit)
        assert chosen is not None
        assert chosen.shared_bytes <= limit
        assert chosen.chunks >= 2
        assert chosen.threads <= 1024


def test_rows_that_are_too_long_have_no_variant():
    assert variant_for(65536, BF16, 1, "silu", shared_limit=227 * 1024) is None


@needs_nvrtc
def test_source_that_does_not_compile_is_an_error_with_the_log():
    from cats.ops.cuda.compiler import compile_kernel

    with pytest.raises(BackendError, match="too little shared memory"):
        compile_kernel(SOURCE, variant(8).defines() | {"SHARED_BYTES": 16}, (9, 0))


def test_refuses_more_tokens_and_rows_that_are_not_aligned():
    weight = torch.zeros(4, 12, dtype=BF16)
    shifted = torch.zeros(4 * 8 + 1, dtype=BF16)[1:].view(4, 8)
    for match, tokens, weights in (
        ("tokens", torch.zeros(3, 8), weight),
        ("24", torch.zeros(1, 12), weight),
        ("begin", torch.zeros(1, 8), shifted),
    ):
        operands = tokens.to(BF16), weights, weights, weights.t(), torch.zeros(4)
        assert match in cuda.refuses(GatedMLPArguments(*operands, "silu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_why_it_is_not_live():
    assert "GPU" in cuda.unavailable()


# --- on a GPU


@pytest.fixture
def gpu() -> torch.device:
    skip_unavailable("cuda")
    return torch.device("cuda")


@pytest.fixture(params=[False, True], ids=["fast", "in_order"])
def in_order(request):
    torch.use_deterministic_algorithms(request.param)
    return request.param


@pytest.fixture
def launches(monkeypatch) -> list[MLPArguments]:
    """The arguments of the kernel's launches from here on."""
    from cats.ops.cuda.function import Function

    arguments, launch = [], Function.launch

    def recording_launch(function, struct, **options):
        assert options["dependent"] == struct.request_early
        arguments.append(struct)
        launch(function, struct, **options)

    monkeypatch.setattr(Function, "launch", recording_launch)
    return arguments


def call(inputs: Inputs) -> torch.Tensor:
    return torch.ops.cats.gated_mlp(*inputs.args(), "cuda")


def assert_right(out: torch.Tensor, inputs: Inputs) -> None:
    torch.testing.assert_close(
        out.double(), reference_in_double(inputs), **TOLERANCE[inputs.x.dtype]
    )


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("D", [8, 264, 1000, 5120])
@pytest.mark.parametrize("F", [1, 131, 5003])
def test_odd_shapes_match(D, F, batch, dtype, gpu, in_order):
    for sparsity in (0, 0.6, 1):
        inputs = make_inputs(D, F, dtype=dtype, device=gpu, batch=batch, sparsity=sparsity)
        assert_right(call(inputs), inputs)


def test_workspace_is_zero_after_each_call(gpu):
    from cats.ops.cuda.workspace import workspaces

    torch.use_deterministic_algorithms(False)
    call(make_inputs(1024, 3000, dtype=BF16, device=gpu, batch=2))
    torch.cuda.synchronize()
    assert workspaces()
    assert not any(space.any() for space in workspaces())


def test_overlapping_calls_in_a_graph_match(gpu, in_order):
    cases = [
        make_inputs(D, F, dtype=BF16, device=gpu, sparsity=s)
        for D, F, s in [(4096, 3000, 0.5), (576, 1536, 0.9), (4096, 500, 0), (2048, 4000, 1)] * 3
    ]
    [call(inputs) for inputs in cases]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [call(inputs) for inputs in cases]
    for _ in range(10):
        [out.fill_(torch.nan) for out in outs]
        graph.replay()
        for out, inputs in zip(outs, cases, strict=True):
            assert_right(out, inputs)


def test_weights_are_requested_early_only_right_after_this_kernel(gpu, launches):
    # in deterministic mode PyTorch fills new outputs, which is a kernel in between
    torch.use_deterministic_algorithms(False)
    inputs = make_inputs(256, 512, dtype=BF16, device=gpu)
    call(inputs)
    launches.clear()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        call(inputs)
        call(inputs)
        inputs.gate.mul_(2)
        call(inputs)
        call(inputs)
    assert [struct.request_early for struct in launches] == [False, True, False, True]


def test_output_of_a_call_may_be_the_gate_of_the_next_one(gpu):
    torch.use_deterministic_algorithms(False)
    first = make_inputs(256, 512, dtype=BF16, device=gpu)
    second = make_inputs(256, 1, dtype=BF16, device=gpu, sparsity=0)
    gate = call(first)
    expected = call(second.replace(gate=gate))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(second.replace(gate=call(first)))
    for _ in range(5):
        out.fill_(torch.nan)
        graph.replay()
        torch.testing.assert_close(out, expected, **TOLERANCE[BF16])


def test_each_captured_graph_has_its_own_workspace(gpu, launches):
    inputs = make_inputs(256, 512, dtype=BF16, device=gpu)
    call(inputs)
    graphs = [torch.cuda.CUDAGraph() for _ in range(3)]
    for graph in graphs:
        with torch.cuda.graph(graph):
            call(inputs)
    assert len({struct.counters for struct in launches}) == len(launches) == 4


def test_first_call_of_a_width_may_be_captured(gpu):
    inputs = make_inputs(760, 512, dtype=BF16, device=gpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(inputs)
    graph.replay()
    assert_right(out, inputs)


def test_misaligned_biases_are_read_right(gpu):
    inputs = make_inputs(64, 96, dtype=BF16, device=gpu, bias=True)
    shifted = {
        name: torch.cat([bias[:1], bias])[1:]
        for name in ("gate_bias", "up_bias", "down_bias")
        if (bias := getattr(inputs, name)) is not None
    }
    assert all(bias.data_ptr() % 4 for bias in shifted.values())
    assert_right(call(inputs.replace(**shifted)), inputs)


class Reserved:
    """A matrix of bfloat16 whose last pages are reserved addresses without memory behind them."""

    def __init__(self, rows: int, mapped: int, D: int) -> None:
        from cuda.bindings import driver

        from cats.ops.cuda.status import check

        kind = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        options = driver.CUmemAllocationProp()
        options.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        options.location.type, options.location.id = kind, torch.cuda.current_device()
        access = driver.CUmemAccessDesc()
        access.location.type, access.location.id = kind, torch.cuda.current_device()
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self.address = check(driver.cuMemAddressReserve(2 * rows * D, 0, 0, 0))
        memory = check(driver.cuMemCreate(2 * mapped * D, options, 0))
        check(driver.cuMemMap(self.address, 2 * mapped * D, 0, memory, 0))
        check(driver.cuMemSetAccess(self.address, 2 * mapped * D, [access], 1))
        self.__cuda_array_interface__ = {
            "shape": (rows, D),
            "typestr": "<i2",
            "data": (int(self.address), False),
            "version": 3,
        }

    def tensor(self) -> torch.Tensor:
        return torch.as_tensor(self, device="cuda").view(BF16)


@pytest.mark.parametrize("router", ["gate", "up"])
def test_rows_of_dropped_neurons_are_not_read(router, gpu, in_order):
    # 2 MiB pages hold 256 rows: the last 512 neurons are dropped, and their rows do not exist
    D, F, mapped = 4096, 1024, 512
    inputs = make_inputs(D, F, dtype=BF16, device=gpu, router=router)
    inputs.thresholds[mapped:] = torch.inf
    other, down = Reserved(F, mapped, D), Reserved(F, mapped, D)
    name = "up" if router == "gate" else "gate"
    other.tensor()[:mapped] = getattr(inputs, name)[:mapped]
    down.tensor()[:mapped] = inputs.down.t()[:mapped]
    out = call(inputs.replace(**{name: other.tensor(), "down": down.tensor().t()}))
    torch.cuda.synchronize()
    assert_right(out, inputs)


def test_columns_of_dropped_products_are_not_read(gpu, in_order):
    D, F, mapped = 4096, 1024, 512
    inputs = make_inputs(D, F, dtype=BF16, device=gpu, sparsity=0)
    products = torch.zeros(F, device=gpu)
    products[mapped:] = torch.inf
    inputs = inputs.replace(product_thresholds=products)
    down = Reserved(F, mapped, D)
    down.tensor()[:mapped] = inputs.down.t()[:mapped]
    out = call(inputs.replace(down=down.tensor().t()))
    torch.cuda.synchronize()
    assert_right(out, inputs)


@pytest.mark.parametrize("tool", sanitize_cuda.OPTIONS)
def test_sanitizer_finds_nothing(tool, gpu):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed")
    run = sanitize_cuda.sanitize(tool)
    assert run.returncode == 0, run.stdout[-5000:]


def test_every_gpu_works_at_once(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    cases = [
        make_inputs(1024, 3000, dtype=BF16, device=torch.device("cuda", index))
        for index in range(torch.cuda.device_count())
    ]
    outs = [[call(inputs) for inputs in cases] for _ in range(20)]
    for round_of_outs in outs:
        for out, inputs in zip(round_of_outs, cases, strict=True):
            assert out.device == inputs.x.device
            assert_right(out, inputs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_workspace_of_a_graph_serves_another_when_the_graph_is_gone():
    from cats.ops.cuda.workspace import workspaces

    inputs = make_inputs(64, 96, dtype=torch.float32, device=torch.device("cuda"))

    def captured():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = cuda.gated_mlp(GatedMLPArguments(*inputs.args()))
        graph.replay()
        torch.cuda.synchronize()
        return graph, out

    cuda.gated_mlp(GatedMLPArguments(*inputs.args()))
    first, expected = captured()
    for _ in range(300):
        graph, out = captured()
        assert torch.equal(out, expected)
        del graph, out
        time.sleep(0.001)  # the driver tells of it from another thread
    assert len(workspaces()) < 100
    first.replay()
