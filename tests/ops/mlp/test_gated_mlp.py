"""Every live backend of ``cats::gated_mlp`` against the reference and against float64."""

from collections.abc import Callable

import pytest
import torch

from cats import ops
from cats.errors import BackendError, ShapeError
from cats.functional import ACTIVATIONS
from cats.ops.mlp import backends
from tests.models import Int8Tensor
from tests.ops.cases import (
    BAND,
    DTYPES,
    LARGE_SHAPES,
    SMALL_SHAPES,
    TINY_SHAPES,
    Inputs,
    assert_matches,
    check_taken,
    make_inputs,
    product,
    reference_in_double,
    router_output,
    run,
    skip_unavailable,
    tolerance,
)

GPU = torch.cuda.is_available()
gpu_only = pytest.mark.skipif(not GPU, reason="needs a GPU")
THRESHOLDS = [
    pytest.param(dict(sparsity=0), id="zero"),
    pytest.param(dict(sparsity=0.5), id="half"),
    pytest.param(dict(sparsity=0.7, per_neuron=True), id="per_neuron"),
    pytest.param(dict(sparsity=1), id="infinite"),
]
F32, BF16 = torch.float32, torch.bfloat16


# without the backend of another device
HERE = [name for name in ops.BACKENDS if name != ("cpu" if GPU else "cuda")]


@pytest.fixture(params=HERE)
def backend(request: pytest.FixtureRequest) -> str:
    skip_unavailable(request.param)
    return request.param


@pytest.fixture(params=[name for name in HERE if name != "dense"])
def sparse_backend(request: pytest.FixtureRequest) -> str:
    """The backends that read only what kept neurons need."""
    skip_unavailable(request.param)
    return request.param


@pytest.fixture(params=[False, True], ids=["fast", "deterministic"])
def mode(request: pytest.FixtureRequest) -> None:
    """Both modes; the deterministic one also poisons ``torch.empty``, in every other test too."""
    torch.use_deterministic_algorithms(request.param, warn_only=True)


# --- against the reference and float64


@pytest.mark.parametrize("thresholds", THRESHOLDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "F"), TINY_SHAPES)
def test_tiny_shapes_match(backend, D, F, dtype, thresholds, device):
    assert_matches(backend, make_inputs(D, F, dtype=dtype, device=device, **thresholds))


@pytest.mark.parametrize("thresholds", THRESHOLDS)
@pytest.mark.parametrize(("D", "F"), SMALL_SHAPES)
def test_small_models_match(backend, D, F, thresholds, device, mode):
    if backend == "triton" and not GPU and SMALL_SHAPES[0] != (D, F):
        pytest.skip("too long through Triton's interpreter; runs on a GPU")
    assert_matches(backend, make_inputs(D, F, dtype=BF16, device=device, **thresholds))


@gpu_only
@pytest.mark.parametrize("thresholds", THRESHOLDS[:2])
@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize(("D", "F"), LARGE_SHAPES)
def test_large_models_match(backend, D, F, batch, thresholds, device, mode):
    inputs = make_inputs(D, F, dtype=BF16, device=device, batch=batch, **thresholds)
    assert_matches(backend, inputs)


@pytest.mark.parametrize("batch", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_token_keeps_its_own_mask(backend, batch, dtype, device):
    inputs = make_inputs(64, 61, dtype=dtype, device=device, batch=batch, per_neuron=True)
    assert_matches(backend, inputs)


@pytest.mark.parametrize("product_sparsity", [None, 0.5], ids=["", "product"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("router", ["gate", "up"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_form_matches(backend, activation, router, bias, product_sparsity, device):
    form = dict(activation=activation, router=router, bias=bias, product_sparsity=product_sparsity)
    assert_matches(backend, make_inputs(72, 64, dtype=F32, device=device, batch=2, **form))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("router", ["gate", "up"])
def test_every_form_at_once_matches_in_each_dtype(backend, router, dtype, device, mode):
    form = dict(router=router, activation="gelu_tanh", bias=True, product_sparsity=0.3)
    shape = dict(dtype=dtype, device=device, batch=3)
    assert_matches(backend, make_inputs(129, 61, **shape, **form, per_neuron=True))


@pytest.mark.parametrize("router", ["gate", "up"])
def test_router_drops_inputs(backend, router, device):
    options = dict(batch=3, router=router, bias=True, product_sparsity=0.3, input_sparsity=0.4)
    assert_matches(backend, make_inputs(64, 96, dtype=torch.float32, device=device, **options))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_accurate_far_from_zero(backend, activation, device):
    # one neuron at a time: a sum over many would hide an error
    for value in (-90.0, -20.0, -5.0, -1e-3, 1e-3, 5.0, 20.0, 90.0):
        inputs = one_neuron(value, activation=activation, device=device)
        actual, exact = run(backend, inputs), reference_in_double(inputs)
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=2e-7 * abs(value))


@pytest.mark.parametrize("router", ["gate", "up"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_neurons_flip_only_inside_the_rounding_band(backend, router, dtype, device):
    inputs = make_inputs(64, 512, dtype=dtype, device=device, router=router, separate=False)
    actual = run(backend, inputs).double()
    size = router_output(inputs).abs()
    near = (size - inputs.thresholds).abs() < BAND[dtype]
    assert near.any()
    assert not near.all()
    everything = product(inputs.replace(thresholds=torch.zeros_like(inputs.thresholds)))
    allowed = torch.where(near, everything, 0).abs() @ inputs.down.double().abs().t()
    exact = reference_in_double(inputs)
    close = tolerance(backend, dtype)
    error = (actual - exact).abs()
    assert (error <= allowed + close["atol"] + close["rtol"] * exact.abs()).all()


# --- the rule at its edges


def one_neuron(
    value: float, *, device: torch.device, activation: str = "relu", threshold: float = 0.0
) -> Inputs:
    """One neuron of gate ``value``, up 1 and down 1, float32."""
    one = torch.ones(1, 1, device=device)
    thresholds = torch.full((1,), threshold, device=device)
    weights = dict(gate=one * value, up=one, down=one)
    return Inputs(x=one, **weights, thresholds=thresholds, activation=activation)


@pytest.mark.parametrize("router", ["gate", "up"])
def test_value_equal_to_threshold_is_kept(backend, router, device):
    below = torch.tensor(0.5).nextafter(torch.tensor(0.0)).item()
    for value, expected in ((0.5, 0.5), (below, 0.0)):
        inputs = one_neuron(value, threshold=0.5, device=device)
        if router == "up":
            inputs = inputs.replace(router="up", gate=inputs.up, up=inputs.gate)
        assert run(backend, inputs).item() == expected


def test_negative_values_are_compared_by_size(backend, device):
    inputs = one_neuron(1.0, threshold=0.5, device=device)
    for value, expected in ((-0.5, -0.5), (-0.4, 0.0)):
        up = torch.full_like(inputs.up, value)
        assert run(backend, inputs.replace(up=up, router="up")).item() == expected


def test_product_equal_to_its_threshold_is_kept(backend, device):
    inputs = one_neuron(0.5, device=device)
    for t2, expected in ((0.5, 0.5), (0.51, 0.0)):
        product_thresholds = torch.full((1,), t2, device=device)
        assert run(backend, inputs.replace(product_thresholds=product_thresholds)) == expected


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf_inputs_give_what_the_reference_gives(backend, activation, value, device):
    for sparsity in (0.5, 1):
        inputs = make_inputs(
            40, 24, dtype=F32, device=device, batch=3, sparsity=sparsity, activation=activation
        )
        inputs.x[1, 7] = value
        actual, expected = run(backend, inputs), run("reference", inputs)
        assert not expected[1].isfinite().all()
        torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance(backend, F32))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_neuron_that_overflows_shows(backend, value, device):
    inputs = one_neuron(value, threshold=1.0, device=device)
    torch.testing.assert_close(run(backend, inputs), run("reference", inputs), equal_nan=True)
    assert not run(backend, inputs).isfinite().any()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("router", ["gate", "up"])
@pytest.mark.parametrize("batch", [1, 3])
def test_poison_in_dropped_rows_does_not_leak(sparse_backend, batch, router, poison, device):
    options = dict(batch=batch, router=router, sparsity=0.8, product_sparsity=0.5)
    inputs = make_inputs(96, 90, dtype=F32, device=device, **options)
    expected = run(sparse_backend, inputs)
    routed = router_output(inputs).abs()
    unread = (routed < inputs.thresholds).all(0)
    unneeded = (product(inputs).abs() < inputs.product_thresholds).all(0)
    assert unread.any()
    assert (unneeded & ~unread).any()
    (inputs.up if router == "gate" else inputs.gate)[unread] = poison
    inputs.down[:, unneeded] = poison
    assert torch.equal(run(sparse_backend, inputs), expected)


@pytest.mark.parametrize("router", ["gate", "up"])
def test_exact_zeros_are_not_read(sparse_backend, router, device):
    inputs = make_inputs(
        48, 80, dtype=F32, device=device, batch=2, router=router, activation="relu", sparsity=0
    )
    expected = run(sparse_backend, inputs)
    unneeded = (product(inputs) == 0).all(0)
    assert unneeded.any()
    assert not unneeded.all()
    if router == "gate":
        inputs.up[unneeded] = torch.nan
    inputs.down[:, unneeded] = torch.nan
    assert torch.equal(run(sparse_backend, inputs), expected)


def test_token_that_drops_a_neuron_is_not_touched_by_its_nan(sparse_backend, device):
    inputs = make_inputs(32, 48, dtype=F32, device=device, batch=2)
    keeps = router_output(inputs).abs() >= inputs.thresholds
    expected = run(sparse_backend, inputs)
    inputs.up[keeps[0] & ~keeps[1]] = torch.nan
    actual = run(sparse_backend, inputs)
    assert actual[0].isnan().all()
    torch.testing.assert_close(actual[1], expected[1], **tolerance(sparse_backend, F32))


def test_down_bias_alone_remains_where_everything_is_dropped(backend, device):
    inputs = make_inputs(50, 30, dtype=BF16, device=device, batch=2, sparsity=1, bias=True)
    assert torch.equal(run(backend, inputs), inputs.down_bias.expand(2, -1))


# --- determinism, registration, compilation


def test_deterministic_mode_is_bitwise_equal(backend, device):
    D, F = (2048, 8192) if GPU else (96, 300)
    inputs = make_inputs(D, F, dtype=F32, device=device, batch=2)
    torch.use_deterministic_algorithms(True, warn_only=True)
    first = run(backend, inputs)
    assert all(torch.equal(run(backend, inputs), first) for _ in range(20 if GPU else 3))


def test_registration(backend, device):
    inputs = make_inputs(24, 40, dtype=F32, device=device, bias=True)
    check_taken(backend, inputs)
    torch.library.opcheck(torch.ops.cats.gated_mlp.default, inputs.args(), dict(backend=backend))


def test_compiles_without_a_graph_break(backend, device):
    inputs = make_inputs(40, 56, dtype=F32, device=device)
    check_taken(backend, inputs)

    def layer(x: torch.Tensor) -> torch.Tensor:
        args = inputs.replace(x=x).args()
        return x + torch.ops.cats.gated_mlp(*args, backend)

    # inductor's C++ takes minutes of a small CPU and compiles nothing of ours
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    close = tolerance(backend, F32)
    torch.testing.assert_close(compiled(inputs.x), layer(inputs.x), **close)


def test_gradient_is_refused(device):
    inputs = make_inputs(8, 8, dtype=F32, device=device)
    inputs.x.requires_grad_()
    out = ops.gated_mlp(**inputs.kwargs(), backend="reference")
    with pytest.raises(BackendError, match="no gradient"):
        out.sum().backward()


# --- streams and graphs


def captured(call: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of ``call`` and its output tensor; warmed up on a side stream, as torch asks."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


@gpu_only
@pytest.mark.parametrize("batch", [1, 2])
def test_graph_replays_with_new_inputs(backend, batch, device, mode):
    inputs = make_inputs(1024, 4096, dtype=BF16, device=device, batch=batch, separate=False)
    check_taken(backend, inputs)
    graph, out = captured(lambda: run(backend, inputs))
    for _ in range(5):
        inputs.x.normal_()
        graph.replay()
        expected = run(backend, inputs)
        torch.testing.assert_close(out, expected, **tolerance(backend, BF16))


@gpu_only
def test_two_graphs_on_two_streams_do_not_disturb_each_other(sparse_backend, device, mode):
    # graphs captured on one stream share the workspace of cuBLAS, in torch itself
    if sparse_backend == "reference":
        pytest.skip("runs torch's operators alone, like dense")
    backend = sparse_backend
    cases = [make_inputs(2048, 8192, dtype=BF16, device=device) for _ in range(2)]
    check_taken(backend, cases[0])
    expected = [run(backend, inputs) for inputs in cases]
    graphs = [captured(lambda i=inputs: [run(backend, i) for _ in range(8)]) for inputs in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(20):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, outs), reference in zip(graphs, expected, strict=True):
        for out in outs:
            torch.testing.assert_close(out, reference, **tolerance(backend, BF16))


@gpu_only
def test_live_calls_on_two_streams_do_not_disturb_each_other(backend, device, mode):
    cases = [make_inputs(2048, 8192, dtype=BF16, device=device) for _ in range(2)]
    expected = [run(backend, inputs) for inputs in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    outs = []
    for _ in range(50):
        for inputs, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                outs.append(run(backend, inputs))
    torch.cuda.synchronize()
    for out, reference in zip(outs, expected * 50, strict=True):
        torch.testing.assert_close(out, reference, **tolerance(backend, BF16))


@gpu_only
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_weight_written_right_before_the_call_is_seen(backend, name, graph, device, mode):
    inputs = make_inputs(2048, 8192, dtype=BF16, device=device, sparsity=0)
    check_taken(backend, inputs)
    weight = getattr(inputs, name)
    versions = [torch.randn_like(weight).mul_(weight.std()) for _ in range(2)]
    references = [run(backend, inputs.replace(**{name: version})) for version in versions]

    def alternate() -> list[torch.Tensor]:
        outs = []
        for version in versions * 4:
            weight.copy_(version)
            outs.append(run(backend, inputs))
        return outs

    if graph:
        replay, outs = captured(alternate)
        replay.replay()
    else:
        outs = alternate()
    for out, expected in zip(outs, references * 4, strict=True):
        torch.testing.assert_close(out, expected, **tolerance(backend, BF16))


@gpu_only
def test_weights_past_2_31_elements(sparse_backend, device):
    D, F = 8192, 2**31 // 8192 + 4096
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of GPU memory")
    rows = [torch.empty(F, D, device=device, dtype=BF16).normal_().mul_(D**-0.5) for _ in range(3)]
    thresholds = torch.full((F,), torch.inf, device=device)
    # only neurons at both ends are kept, the last ones past 2**31
    ends = [0, 1, F - 4000, F - 2, F - 1]
    thresholds[ends] = 0
    gate, up, down = rows
    x = torch.randn(1, D, device=device, dtype=BF16)
    inputs = Inputs(x=x, gate=gate, up=up, down=down.t(), thresholds=thresholds)
    weights = dict(gate=gate[ends], up=up[ends], down=down[ends].t())
    few = Inputs(x=x, **weights, thresholds=thresholds[ends])
    torch.testing.assert_close(
        run(sparse_backend, inputs).double(),
        reference_in_double(few),
        **tolerance(sparse_backend, BF16),
    )


# --- errors


def valid(device: torch.device) -> Inputs:
    return make_inputs(8, 12, dtype=F32, device=device, batch=2, bias=True, product_sparsity=0.5)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("x", lambda t: t[0], "expected x"),
        ("x", lambda t: t[:, :7], "expected x"),
        ("x", lambda t: t.repeat(1, 2)[:, ::2], "x must be contiguous"),
        ("gate", lambda t: t[:, :7].contiguous(), "expected"),
        ("gate", lambda t: t.bfloat16(), "expected gate"),
        ("gate", lambda t: t.t().contiguous().t(), "gate must be contiguous"),
        ("up", lambda t: t[:5].contiguous(), "expected up"),
        ("up", lambda t: t.half(), "expected up"),
        ("down", lambda t: t.t(), "expected down"),
        ("down", lambda t: t.contiguous(), "column-major"),
        ("thresholds", lambda t: t.double(), "expected thresholds"),
        ("thresholds", lambda t: t[:5], "expected thresholds"),
        ("gate_bias", lambda t: t[:5], "expected gate_bias"),
        ("up_bias", lambda t: t.bfloat16(), "expected up_bias"),
        ("down_bias", lambda t: t[:5], "expected down_bias"),
        ("product_thresholds", lambda t: t[:5], "expected product_thresholds"),
        ("activation", lambda _: "tanh", "activation must be one of"),
        ("router", lambda _: "down", "router must be one of"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_name(name, change, match, device):
    inputs = valid(device)
    with pytest.raises(ShapeError, match=match):
        ops.gated_mlp(**inputs.replace(**{name: change(getattr(inputs, name))}).kwargs())


def test_one_number_is_the_threshold_of_all_neurons(device):
    inputs = valid(device)
    vector = torch.full((12,), 0.3, device=device)
    expected = run("reference", inputs.replace(thresholds=vector))
    for number in (0.3, vector[0], vector[:1]):
        kwargs = inputs.replace(thresholds=number).kwargs()
        assert torch.equal(ops.gated_mlp(**kwargs, backend="reference"), expected)


def test_backend_of_another_device_is_an_error(device):
    other = "cpu" if GPU else "cuda"
    with pytest.raises(BackendError, match=f"the backend {other} cannot run this call: .+"):
        ops.gated_mlp(**valid(device).kwargs(), backend=other)


def test_unknown_backend_is_an_error(device):
    with pytest.raises(BackendError, match="backend must be auto or one of reference"):
        ops.gated_mlp(**valid(device).kwargs(), backend="fastest")


def test_backends_name_each_backend_and_reason():
    states = ops.backends()
    assert tuple(states) == ops.BACKENDS
    assert states["reference"] == states["dense"] == "live"
    assert all(states.values())


def test_device_without_kernels_gets_dense_gemms_and_a_warning():
    inputs = valid(torch.device("cpu"))
    tensors = [t.to("meta") for t in (inputs.x, inputs.gate, inputs.up, inputs.down)]
    backends._warn_once.cache_clear()  # private: another test may have warned in this process
    with pytest.warns(UserWarning, match="on meta.*kernels for cuda, cpu only"):
        assert ops.backend_for(*tensors) == "dense"
    arguments = ops.GatedMLPArguments(*tensors, torch.empty(12, device="meta"), "silu")
    for name in ("cpu", "cuda"):
        with pytest.raises(BackendError, match=f"the backend {name} cannot run this call: .+"):
            ops.checked(arguments, name)


def test_weights_on_meta_and_of_tensor_classes_are_refused(device):
    inputs = valid(device)
    with pytest.raises(ShapeError, match="expected gate"):
        ops.gated_mlp(**inputs.replace(gate=inputs.gate.to("meta")).kwargs())
    scale = torch.ones(12, 1, device=device)
    gate = Int8Tensor(torch.ones(12, 8, dtype=torch.int8, device=device), scale)
    with pytest.raises(ShapeError, match="Int8Tensor"):
        ops.gated_mlp(**inputs.replace(gate=gate).kwargs())
