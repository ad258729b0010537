"""The CUDA kernel of the gated MLP of several tokens on a CPU, by an emulator."""

import pytest
import torch

from cats.benchmarks.timing import Timing
from cats.errors import UnsupportedModelError
from cats.ops.cuda import rows_input
from tests.ops.cases import (
    BAND,
    make_inputs,
    reference_in_double,
    router_output,
    thresholds_at,
)
from tests.ops.emulator import EmulatedFunction, emulated_kernels, imagine_gpu, needs_emulator

pytestmark = needs_emulator
BF16, F16 = torch.bfloat16, torch.float16
CPU = torch.device("cpu")


@pytest.fixture
def mlp(monkeypatch):
    """Launches on an imaginary GPU of two multiprocessors."""
    from cats.ops.mlp.cuda import rows

    imagine_gpu(monkeypatch, multiprocessors=2, shared_bytes=120 * 1024)
    with emulated_kernels(monkeypatch):
        yield rows


def prepare(mlp, inputs, sums, *, active=None, counters=None, multiprocessors=2):
    return mlp.launches(
        x=inputs.x,
        gate=inputs.gate,
        up=inputs.up,
        down=inputs.down,
        thresholds=inputs.thresholds,
        activation=inputs.activation,
        gate_bias=inputs.gate_bias,
        up_bias=inputs.up_bias,
        active=active,
        sums=sums,
        counters=counters,
        multiprocessors=multiprocessors,
    )


def run(mlp, inputs, **options):
    """What the kernel adds to zeros, ``[tokens, D]``, float32."""
    sums = torch.zeros_like(inputs.x, dtype=torch.float32)
    for launch in prepare(mlp, inputs, sums, **options):
        launch.function.launch(launch.arguments, blocks=launch.blocks, stream=0, dependent=True)
    return sums


def check(sums, inputs):
    expected = reference_in_double(inputs)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "D", "F", "dtype", "options"),
    [
        (1, 8, 3, BF16, dict(sparsity=0)),
        (1, 64, 257, F16, dict(activation="gelu")),
        (2, 72, 90, BF16, dict(per_neuron=True, activation="relu")),
        (4, 328, 61, F16, dict(sparsity=0.9)),
        (8, 264, 120, BF16, dict(activation="gelu_tanh")),
        (8, 1160, 40, F16, dict(sparsity=0)),
        (16, 136, 75, BF16, dict(sparsity=0.7)),
        (16, 2312, 24, F16, dict()),
    ],
)
def test_output_is_that_of_the_reference(mlp, tokens, D, F, dtype, options):
    inputs = make_inputs(D, F, dtype=dtype, device=CPU, batch=tokens, **options)
    bias = [torch.randn(F).mul_(0.5).to(dtype) if F > 60 else None for _ in range(2)]
    if F > 60:
        inputs = with_biases(inputs, *bias, sparsity=options.get("sparsity", 0.5))
    check(run(mlp, inputs), inputs)


def with_biases(inputs, gate_bias, up_bias, sparsity):
    """Thresholds are chosen anew: no value may be near its own."""
    inputs = inputs.replace(gate_bias=gate_bias, up_bias=up_bias)
    band = BAND[inputs.x.dtype]
    values = router_output(inputs)
    return inputs.replace(thresholds=thresholds_at(values, sparsity, per_neuron=False, band=band))


# One set of macros is one run of the compiler, so tests share this size: more neurons than two
# blocks keep in their rings.
def many(tokens=4, **options):
    return make_inputs(64, 523, dtype=BF16, device=CPU, batch=tokens, **options)


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.97])
@pytest.mark.parametrize("counted", [False, True])
def test_every_neuron_is_taken_once_however_they_are_dealt_out(mlp, counted, sparsity):
    inputs = many(sparsity=sparsity)
    counters = torch.zeros(2, dtype=torch.int32) if counted else None
    check(run(mlp, inputs, counters=counters), inputs)
    assert not counted or counters[0] > 0


def test_output_is_added_to_the_stream(mlp):
    inputs, stream = many(), torch.randn(4, 64)
    expected = reference_in_double(inputs) + stream.double()
    (launch,) = prepare(mlp, inputs, stream)
    launch.function.launch(launch.arguments, blocks=launch.blocks, stream=0, dependent=True)
    torch.testing.assert_close(stream.double(), expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_added_where_all_neurons_are_dropped(mlp):
    assert not run(mlp, many(sparsity=1)).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_harms_no_other(mlp, bad):
    inputs = many()
    inputs.x[1, 7] = bad
    sums = run(mlp, inputs)
    assert not sums[1].isfinite().any()
    others = [0, 2, 3]
    expected = reference_in_double(inputs)[others]
    torch.testing.assert_close(sums[others].double(), expected, rtol=1e-4, atol=1e-4)


def test_a_token_that_is_not_active_keeps_no_neuron_and_gets_nothing(mlp):
    inputs = many()
    inputs.x[3] = torch.nan
    sums = run(mlp, inputs, active=torch.tensor([1, 1, 1, 0], dtype=torch.int32))
    assert not sums[3].any()
    torch.testing.assert_close(
        sums[:3].double(), reference_in_double(inputs)[:3], rtol=1e-4, atol=1e-4
    )


def test_rows_that_no_active_token_keeps_are_not_read(mlp):
    inputs = many()
    active = torch.tensor([1, 0, 1, 0], dtype=torch.int32)
    kept = inputs.replace(x=inputs.x[[0, 2]])
    dropped = (router_output(kept).abs() < inputs.thresholds).all(0)
    assert 0.1 < dropped.double().mean() < 0.9
    expected = reference_in_double(inputs)
    inputs.up[dropped] = torch.nan
    inputs.down.t()[dropped] = torch.nan
    sums = run(mlp, inputs, active=active)
    torch.testing.assert_close(sums[[0, 2]].double(), expected[[0, 2]], rtol=1e-4, atol=1e-4)


def test_mask_of_a_token_does_not_depend_on_the_others(mlp):
    inputs = many(sparsity=0.7)
    alone = run(mlp, inputs.replace(x=inputs.x[:1]))
    together = run(mlp, inputs)
    # neurons of a product are others, so its sums differ in their order
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-6)


def test_an_infinite_product_gives_infinite_outputs(mlp):
    inputs = many(sparsity=0)
    up_bias = torch.zeros(523, dtype=BF16)
    up_bias[77] = torch.inf
    inputs = inputs.replace(up_bias=up_bias, gate_bias=torch.zeros(523, dtype=BF16))
    assert reference_in_double(inputs).isinf().all()
    check(run(mlp, inputs), inputs)


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_products_keep_their_precision(mlp, size):
    inputs = many()
    inputs = inputs.replace(up=inputs.up * size)
    sums, expected = run(mlp, inputs).double(), reference_in_double(inputs)
    torch.testing.assert_close(sums / size, expected / size, rtol=1e-4, atol=1e-4)


def test_sixteen_tokens_of_long_rows_are_two_launches(mlp):
    inputs = make_inputs(4608, 9, dtype=BF16, device=CPU, batch=16)
    sums = torch.zeros(16, 4608)
    assert len(prepare(mlp, inputs, sums)) == 2
    check(run(mlp, inputs), inputs)


def test_a_chunk_may_have_sixteen_rows(mlp, monkeypatch):
    monkeypatch.setattr(rows_input, "ROWS_OF_CHUNK", 16)
    inputs = many(tokens=8, sparsity=0.7)
    check(run(mlp, inputs, counters=torch.zeros(2, dtype=torch.int32)), inputs)


def test_a_ring_of_two_chunks_is_enough(mlp):
    inputs = many()
    sums = torch.zeros(4, 64)
    (launch,) = prepare(mlp, inputs, sums)
    defines = launch.function.defines | {"CHUNKS": 2, "EARLY_CHUNKS": 1, "PARTS": 2, "PASSES": 2}
    size = dict(threads=launch.function.threads, shared_bytes=launch.function.shared_bytes)
    function = EmulatedFunction(0, "mlp/cuda/mlp_rows.cu", defines, **size)
    function.launch(launch.arguments, blocks=launch.blocks, stream=0, dependent=True)
    check(sums, inputs)


def test_what_the_kernel_does_not_take_is_refused(mlp, monkeypatch):
    for dtype, D, reason in ((torch.float32, 64, "float32"), (BF16, 60, "16 bytes")):
        inputs = make_inputs(D, 9, dtype=dtype, device=CPU, batch=2)
        with pytest.raises(UnsupportedModelError, match=reason):
            run(mlp, inputs)
    imagine_gpu(monkeypatch, multiprocessors=2, shared_bytes=48 * 1024)
    with pytest.raises(UnsupportedModelError, match="two chunks"):
        run(mlp, make_inputs(2048, 9, dtype=BF16, device=CPU, batch=2))


def test_times_of_several_tokens(mlp, monkeypatch):
    from tests.ops.mlp import time_rows

    monkeypatch.setattr(time_rows, "read_bandwidth", lambda *a, **k: Timing.once(1e-3))
    bench = time_rows.Bench(CPU, rounds=2, chain=2, read_bytes=1000)
    settings = time_rows.SETTINGS[:1]
    lines = [
        line
        for sparsity in (0.0, 0.5)
        for line in bench.measure((64, 40), (1, 4), sparsity, settings)
    ]
    assert [(line["kernel"], line["tokens"]) for line in lines] == 2 * [
        (settings[0].name, 1),
        (settings[0].name, 4),
        ("gated_mlp", 1),
    ]
    assert all(line["us"] > 0 and line["share"] > 0 for line in lines)
    assert [line["union"] for line in lines[:3]] == [1, 1, 1]
    assert lines[3]["union"] == lines[5]["union"] < lines[4]["union"] < 1
