"""The CPU backend beyond ``test_gated_mlp.py``: instruction sets, threads, the build."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import cats
from cats import ops
from cats.errors import BackendError
from cats.functional import ACTIVATIONS
from cats.ops import cpu
from tests.ops.cases import (
    SMALL_SHAPES,
    TINY_SHAPES,
    assert_matches,
    make_inputs,
    reference_in_double,
    run,
    tolerance,
)

SOURCES = Path(cpu.__file__).parent
REPOSITORY = Path(__file__).parents[2]
INSTRUCTION_SETS = ["avx512_bf16", "avx512", "avx2", "generic"]
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]

needs_kernels = pytest.mark.skipif(
    cpu.unavailable() is not None, reason=f"the CPU kernels are not there: {cpu.unavailable()}"
)
needs_source = pytest.mark.skipif(
    not (REPOSITORY / "setup.py").exists() or not shutil.which("g++"),
    reason="needs the repository and g++",
)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    if cpu.unavailable() or request.param not in cpu.instruction_sets():
        pytest.skip(f"this processor has no {request.param}, or no kernels are built")
    before = cpu.instruction_set()
    cpu.select(request.param)
    yield request.param
    cpu.select(before)


@pytest.fixture(params=[1, 2, 3, 8])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def linear(x, weight, bias=None):
    with torch.inference_mode():
        return torch.ops.cats.linear.default(x, weight, bias)


def linear_inputs(N, D, *, dtype, batch=1, bias=True):
    """``x [B, D]``, weight and bias; outputs have about unit variance."""
    x, weight = torch.randn(batch, D, dtype=dtype), torch.randn(N, D, dtype=dtype) * D**-0.5
    return x, weight, torch.randn(N, dtype=dtype) if bias else None


def assert_linear_matches(x, weight, bias):
    actual = linear(x, weight, bias)
    wide = None if bias is None else bias.double()
    expected = torch.nn.functional.linear(x.double(), weight.double(), wide).to(x.dtype)
    torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance("cpu", x.dtype))


# --- every instruction set, whichever this processor would choose


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
        inputs = make_inputs(
            D, 203, dtype=dtype, device=CPU, batch=batch, per_neuron=True, bias=True,
            product_sparsity=0.3,
        )  # fmt: skip
        assert_matches("cpu", inputs)


@pytest.mark.parametrize("router", ["gate", "up"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_instruction_set_matches_in_each_form(instruction_set, activation, router):
    inputs = make_inputs(
        72, 104, dtype=torch.float32, device=CPU, batch=3, activation=activation, router=router,
        bias=True,
    )  # fmt: skip
    assert_matches("cpu", inputs)


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
        one = inputs.replace(
            x=x, gate=gate, up=(gate != 2e9).float() * x, down=identity[some].t(),
            thresholds=torch.zeros(400),
        )  # fmt: skip
        actual = run("cpu", one)[0, some].double()
        exact = reference_in_double(one)[0, some]
        # gelu and gelu_tanh cancel for negative values, in float32 and in the unfused model too
        # and exp overflows at 88, where silu is 1e-36
        slack = 2e-7 * values[some].abs().double() if "gelu" in activation else 1e-36
        assert ((actual - exact).abs() <= 2e-6 * exact.abs() + slack).all()


@needs_kernels
def test_unknown_instruction_set_is_an_error():
    with pytest.raises(BackendError, match=r"expected one of .*generic, got 'mmx'"):
        cpu.select("mmx")


# --- cats::linear


@pytest.mark.parametrize("batch", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_matches(instruction_set, batch, dtype):
    # rows longer and shorter than a page, and than a line, are read in different ways
    for N, D in ((1, 1), (3, 5), (61, 37), (257, 131), (67, 1031), (33, 2100)):
        for bias in (False, True):
            assert_linear_matches(*linear_inputs(N, D, dtype=dtype, batch=batch, bias=bias))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_shows_nan_and_inf(instruction_set, dtype, value):
    # one value in the vector part of the row, one in its tail
    for column in (7, 69):
        x, weight, bias = linear_inputs(90, 70, dtype=dtype, batch=2)
        x[0, column] = value
        assert_linear_matches(x, weight, bias)
        x[0, column] = 1
        weight[5, column] = value
        assert_linear_matches(x, weight, bias)
        assert linear(x, weight, bias).isfinite().sum() == 2 * 89


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_is_the_same_in_any_number_of_threads(dtype):
    inputs = linear_inputs(1031, 257, dtype=dtype, batch=2)
    before, found = torch.get_num_threads(), []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        found += [linear(*inputs) for _ in range(5)]
    torch.set_num_threads(before)
    assert all(torch.equal(out, found[0]) for out in found)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_takes_any_leading_dimensions(dtype):
    x, weight, bias = linear_inputs(61, 37, dtype=dtype, batch=6)
    flat = linear(x, weight, bias)
    assert torch.equal(linear(x.view(2, 3, 37), weight, bias), flat.view(2, 3, 61))
    assert torch.equal(linear(x[0], weight, bias), flat[0])


@needs_kernels
@pytest.mark.parametrize("case", ["nine tokens", "float16", "transposed weight", "strided x"])
def test_linear_leaves_the_rest_to_torch(case):
    x, weight, bias = linear_inputs(61, 37, dtype=torch.float32, batch=9)
    if case == "float16":
        x, weight, bias = x[:1].half(), weight.half(), bias.half()
    elif case == "transposed weight":
        x, weight = x[:1], weight.t().contiguous().t()
    elif case == "strided x":
        x = x[::2]
    assert cpu.linear_refuses(x, weight) is not None
    assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


@needs_kernels
def test_linear_of_shapes_that_do_not_fit_is_an_error():
    x, weight, _ = linear_inputs(61, 37, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="torch failed to run aten::linear"):
        linear(x, weight[:, :5].contiguous())


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_linear_passes_opcheck(dtype, needs_gradient):
    x, weight, bias = linear_inputs(13, 8, dtype=dtype, batch=2)
    weight.requires_grad_(needs_gradient)
    torch.library.opcheck(torch.ops.cats.linear.default, (x, weight, bias))


@needs_kernels
def test_linear_has_torchs_gradient():
    x, weight, bias = linear_inputs(13, 8, dtype=torch.float32, batch=2)
    grads = []
    for function in (torch.ops.cats.linear.default, torch.nn.functional.linear):
        inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
        function(*inputs).square().sum().backward()
        grads.append([t.grad for t in inputs])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


# --- cats::rms_norm and cats::rotary


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 1, 31), (1, 2, 3, 576)])
def test_rms_norm_matches(shape, dtype):
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-3).rsqrt()
    # rounded before the weight is multiplied
    expected = (exact.to(dtype).double() * weight.double()).to(dtype)
    with torch.inference_mode():
        actual = torch.ops.cats.rms_norm.default(x, weight, 1e-3)
    torch.testing.assert_close(actual, expected, **tolerance("cpu", dtype))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("angle_batch", [1, 3])
@pytest.mark.parametrize("tokens", [1, 2])
def test_rotary_gives_the_bits_of_torch(tokens, angle_batch, dtype):
    x = torch.randn(3, 5, tokens, 14, dtype=dtype)
    cos, sin = torch.randn(2, angle_batch, 1, tokens, 14, dtype=dtype)
    rotated = torch.cat([-x[..., 7:], x[..., :7]], -1)
    with torch.inference_mode():
        actual = torch.ops.cats.rotary.default(x, cos, sin)
        assert torch.equal(actual, x * cos + rotated * sin)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_norm_and_rotation_show_nan_and_inf(dtype, value):
    x, one = torch.randn(2, 1, 1, 6, dtype=dtype), torch.ones(6, dtype=dtype)
    x[1, 0, 0, 4] = value
    angles = one.expand(1, 1, 1, 6)
    with torch.inference_mode():
        normed = torch.ops.cats.rms_norm.default(x, one, 1e-5)
        turned = torch.ops.cats.rotary.default(x, angles.contiguous(), angles.contiguous())
    assert normed[0].isfinite().all()
    assert normed[1, 0, 0, 4].isnan()
    assert turned[0].isfinite().all()
    assert not turned[1, 0, 0, [1, 4]].isfinite().any()
    assert turned[1, 0, 0, [0, 2, 3, 5]].isfinite().all()


@needs_kernels
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_norm_and_rotation_pass_opcheck(needs_gradient):
    x, weight = torch.randn(2, 3, 1, 8, requires_grad=needs_gradient), torch.randn(8)
    cos, sin = torch.randn(2, 2, 1, 1, 8)
    torch.library.opcheck(torch.ops.cats.rms_norm.default, (x, weight, 1e-5))
    torch.library.opcheck(torch.ops.cats.rotary.default, (x, cos, sin))


@needs_kernels
def test_norm_and_rotation_of_what_does_not_fit_are_errors():
    x, cos = torch.randn(2, 3, 1, 8), torch.randn(2, 1, 1, 8)
    with torch.inference_mode():
        assert cpu.rotary_refuses(x, cos, cos) is None
        for bad in (x.half(), x[..., ::2], x[..., :7].contiguous(), x[0]):
            assert cpu.rotary_refuses(bad, cos, cos) is not None
            with pytest.raises(RuntimeError, match="cats::rotary: expected contiguous x"):
                torch.ops.cats.rotary.default(bad, cos, cos)
        for bad in (cos[:1], cos.bfloat16(), cos[..., :4].contiguous()):
            assert cpu.rotary_refuses(x, cos, bad) is not None
            with pytest.raises(RuntimeError, match="cats::rotary: expected contiguous x"):
                torch.ops.cats.rotary.default(x, cos, bad)
        assert cpu.norm_refuses(x, torch.ones(8)) is None
        for bad in (x.half(), x[..., ::2], x[..., :7].contiguous()):
            assert cpu.norm_refuses(bad, torch.ones(8)) is not None
            with pytest.raises(RuntimeError, match="cats::rms_norm: expected contiguous x"):
                torch.ops.cats.rms_norm.default(bad, torch.ones(8), 1e-5)


# --- threads


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "F"), [(1, 1), (257, 1031), (1100, 700)])
def test_any_number_of_threads_matches_and_repeats_bitwise(threads, D, F, dtype):
    inputs = make_inputs(D, F, dtype=dtype, device=CPU, batch=2)
    assert_matches("cpu", inputs)
    first = run("cpu", inputs)
    assert all(torch.equal(run("cpu", inputs), first) for _ in range(5))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@needs_kernels
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


@needs_kernels
def test_linears_in_several_python_threads_do_not_disturb_each_other(two_threads):
    cases = [
        linear_inputs(900 - 130 * i, 700 + 150 * i, dtype=DTYPES[i % 2], batch=i + 1)
        for i in range(4)
    ]
    expected = [linear(*inputs) for inputs in cases]
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(30):
            if not torch.equal(linear(*cases[i]), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@needs_kernels
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


# --- what is taken and what is left to others


@needs_kernels
def test_auto_takes_what_it_can_and_leaves_the_rest_to_dense():
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


@needs_kernels
def test_what_the_kernel_refuses_is_named():
    inputs = make_inputs(40, 56, dtype=torch.float16, device=CPU)
    with pytest.raises(BackendError, match="cpu cannot run this call: expected float32 or bfloat"):
        ops.gated_mlp(**inputs.kwargs(), backend="cpu")


@needs_kernels
def test_direct_call_that_does_not_fit_is_an_error():
    inputs = make_inputs(40, 56, dtype=torch.float32, device=CPU)
    for name, tensor in (("up", inputs.up[:5]), ("down", inputs.down.contiguous())):
        with pytest.raises(RuntimeError, match=f"shape, dtype or layout of {name}"):
            torch.ops.cats.gated_mlp(*inputs.replace(**{name: tensor}).args())


@needs_kernels
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
    # each output is 64 kB: a leak of one a call would be 128 MB
    assert process.memory_info().rss - before < 20e6


# --- the build


@needs_source
def test_restated_declarations_agree_with_torch_headers(tmp_path):
    include = Path(torch.__file__).parent / "include"
    if not (include / "torch/csrc/stable/c/shim.h").exists():
        pytest.skip("this torch has no headers")
    ours = (SOURCES / "torch_abi.h").read_text()
    # the handles are torch's own here, so that the compiler compares every declaration
    ours = re.sub(r"^(struct|using) .*;.*\n", "", ours, flags=re.MULTILINE)
    ours = ours.replace("BoxedKernel", "void (*)(StableIValue*, uint64_t, uint64_t)")
    source = tmp_path / "both.cpp"
    source.write_text(
        "#include <torch/csrc/stable/c/shim.h>\n"
        + ours
        + "static_assert(kTorchVersion == TORCH_VERSION_2_10_0);\n"
        + "static_assert(sizeof(StableIValue) == 8);\n"
    )
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{include}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_source
def test_failed_build_leaves_a_working_install_that_says_why(tmp_path):
    broken = tmp_path / "compiler"
    broken.write_text("#!/bin/sh\necho 'error: no such instruction'; exit 1\n")
    broken.chmod(0o755)
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={tmp_path}/lib"]
    command += [f"--build-temp={tmp_path}/temp"]
    environment = os.environ | {"CC": str(broken), "CXX": str(broken)}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    assert "the CPU kernels are left out" in done.stdout + done.stderr
    message = tmp_path / "lib/cats/ops/cpu/build_error.txt"
    assert "no such instruction" in message.read_text()

    package = tmp_path / "cats"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(cats.__file__).parent, package, ignore=ignore)
    shutil.copy(message, package / "ops/cpu")
    program = "from cats import ops; print(ops.backends()['cpu'])"
    shown = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "the build failed" in shown.stdout
    assert "no such instruction" in shown.stdout
