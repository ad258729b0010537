"""The CPU backend: instruction sets, threads, refusals. test_gated_mlp.py tests all backends."""

import threading
from collections.abc import Iterator

import pytest
import torch

from cats import ops
from cats.errors import BackendError
from cats.functional import ACTIVATIONS
from tests.ops.cases import (
    SMALL_SHAPES,
    TINY_SHAPES,
    assert_matches,
    make_inputs,
    needs_cpu_kernels,
    reference_in_double,
    run,
    tolerance,
)

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=[1, 2, 3, 8])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "F"), [*TINY_SHAPES, (1031, 67), SMALL_SHAPES[0]])
def test_instruction_set_matches(instruction_set, D, F, dtype):
    for sparsity in (0, 0.5, 1):
        assert_matches("cpu", make_inputs(D, F, dtype=dtype, device=CPU, sparsity=sparsity))


@pytest.mark.parametrize("batch", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_set_matches_in_each_batch(instruction_set, batch, dtype):
    # rows longer and shorter than a page are read in different ways
    for D in (129, 2100):
        options = dict(batch=batch, per_neuron=True, bias=True, product_sparsity=0.3)
        inputs = make_inputs(D, 203, dtype=dtype, device=CPU, **options)
        assert_matches("cpu", inputs)


@pytest.mark.parametrize("router", ["gate", "up"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_instruction_set_matches_in_each_form(instruction_set, activation, router):
    options = dict(batch=3, activation=activation, router=router, bias=True)
    inputs = make_inputs(72, 104, dtype=torch.float32, device=CPU, **options)
    assert_matches("cpu", inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "router"), [(1, "gate"), (1, "up"), (5, "gate")])
def test_instruction_set_skips_inputs_of_the_router(instruction_set, batch, router, dtype):
    # columns longer and shorter than a page are read in different ways
    for D, F in ((1, 1), (37, 61), (131, 2100)):
        for sparsity in (0, 0.4, 1):
            options = dict(batch=batch, router=router, bias=True, product_sparsity=0.3)
            inputs = make_inputs(D, F, dtype=dtype, device=CPU, input_sparsity=sparsity, **options)
            assert_matches("cpu", inputs)


def test_columns_of_dropped_inputs_are_not_read(instruction_set):
    inputs = make_inputs(40, 64, dtype=torch.float32, device=CPU, batch=2, input_sparsity=0.5)
    dropped = (inputs.x.abs() < inputs.input_thresholds).all(0)
    assert dropped.any()
    expected = run("cpu", inputs)
    inputs.gate[:, dropped] = torch.nan
    assert torch.equal(run("cpu", inputs), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_set_shows_nan_and_inf(instruction_set, dtype, value):
    inputs = make_inputs(70, 90, dtype=dtype, device=CPU, batch=2)
    # one value in the vector part of the row, one in its tail
    for column in (7, 69):
        poisoned = inputs.replace(x=inputs.x.clone())
        poisoned.x[0, column] = value
        actual, expected = run("cpu", poisoned), run("reference", poisoned)
        assert not expected[0].isfinite().all()
        torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance("cpu", dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_accurate_at_every_size(instruction_set, activation):
    # as many neurons as values, each with its own output
    values = torch.cat([torch.logspace(-6, 1.94, 400), torch.linspace(0, 100, 400)])
    values = torch.cat([values, -values])
    count = len(values)
    inputs = make_inputs(1, count, dtype=torch.float32, device=CPU, activation=activation)
    identity = torch.eye(count)
    for begin in range(0, count, 400):
        some = slice(begin, begin + 400)
        # down is [D, F], so x has as many values as outputs: gate reads only the first
        gate = torch.zeros(400, count)
        gate[:, 0] = values[some]
        x = torch.zeros(1, count)
        x[0, 0] = 1
        up, down = torch.ones_like(gate) * x, identity[some].t()
        few = inputs.replace(x=x, gate=gate, up=up, down=down, thresholds=torch.zeros(400))
        actual = run("cpu", few)[0, some].double()
        exact = reference_in_double(few)[0, some]
        # gelu and gelu_tanh cancel for negative values, in float32 and in the unfused model too
        # and exp overflows at 88, where silu is 1e-36
        slack = 2e-7 * values[some].abs().double() if "gelu" in activation else 1e-36
        assert ((actual - exact).abs() <= 2e-6 * exact.abs() + slack).all()


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "F"), [(1, 1), (257, 1031), (1100, 700)])
def test_any_number_of_threads_matches_and_repeats_bitwise(threads, D, F, dtype):
    inputs = make_inputs(D, F, dtype=dtype, device=CPU, batch=2)
    assert_matches("cpu", inputs)
    first = run("cpu", inputs)
    assert all(torch.equal(run("cpu", inputs), first) for _ in range(5))


@needs_cpu_kernels
def test_calls_from_several_python_threads_do_not_disturb_each_other(two_threads):
    # each is large enough for a second thread
    cases = [
        make_inputs(700 + 150 * i, 900 - 130 * i, dtype=DTYPES[i % 2], device=CPU, batch=i + 1)
        for i in range(4)
    ]
    expected = [run("cpu", inputs) for inputs in cases]
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(30):
            if not torch.equal(run("cpu", cases[i]), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@needs_cpu_kernels
def test_the_interpreter_is_free_during_a_call():
    # a call that held the lock would let no other Python thread count
    inputs = make_inputs(2048, 4096, dtype=torch.float32, device=CPU, batch=8, sparsity=0)
    counted, stop = 0, threading.Event()

    def count() -> None:
        nonlocal counted
        while not stop.is_set():
            counted += 1

    worker = threading.Thread(target=count)
    worker.start()
    out = torch.ops.cats.gated_mlp.default
    during = 0
    for _ in range(20):
        before = counted
        out(*inputs.args(), "cpu")
        during += counted - before
    stop.set()
    worker.join()
    assert during > 1000


@needs_cpu_kernels
def test_auto_leaves_other_batches_and_dtypes_to_dense():
    for batch, dtype, expected in (
        (1, torch.float32, "cpu"),
        (8, torch.bfloat16, "cpu"),
        (9, torch.float32, "dense"),
        (1, torch.float16, "dense"),
    ):
        inputs = make_inputs(40, 56, dtype=dtype, device=CPU, batch=batch)
        tensors = (inputs.x, inputs.gate, inputs.up, inputs.down)
        assert ops.backend_for(*tensors) == expected
        assert torch.equal(ops.gated_mlp(**inputs.kwargs()), run(expected, inputs))


@needs_cpu_kernels
def test_what_the_kernel_refuses_is_named():
    inputs = make_inputs(40, 56, dtype=torch.float16, device=CPU)
    with pytest.raises(BackendError, match="cpu cannot run this call: expected float32 or bfloat"):
        ops.gated_mlp(**inputs.kwargs(), backend="cpu")


@needs_cpu_kernels
def test_direct_call_that_does_not_fit_is_an_error():
    inputs = make_inputs(40, 56, dtype=torch.float32, device=CPU)
    for name, tensor in (("up", inputs.up[:5]), ("down", inputs.down.contiguous())):
        with pytest.raises(RuntimeError, match=f"shape, dtype or layout of {name}"):
            torch.ops.cats.gated_mlp(*inputs.replace(**{name: tensor}).args())


@needs_cpu_kernels
def test_calls_do_not_leak_tensors():
    psutil = pytest.importorskip("psutil")
    inputs = make_inputs(
        2000, 4, dtype=torch.float32, device=CPU, batch=8, bias=True, product_sparsity=0.5
    )
    process = psutil.Process()
    for _ in range(200):
        run("cpu", inputs)
    before = process.memory_info().rss
    for _ in range(2000):
        run("cpu", inputs)
    # each output is 64 kB: a leak of one per call would be 128 MB
    assert process.memory_info().rss - before < 20e6
