import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cats.errors import BackendError, ShapeError
from cats.functional import ACTIVATIONS
from cats.ops.experts import BACKENDS, ExpertsArguments, gated_experts
from tests.ops.interpreting import bfloat16_as_on_a_gpu  # noqa: F401 (a fixture)
from tests.thorough import usual

# of a token's output, relative to its largest entry
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
NAMES = ["dense", "cpu", "triton"]


def make(b=2, k=2, e=5, d=48, f=37, dtype=torch.float32, seed=0, activation="silu"):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    index = torch.stack([torch.randperm(e, generator=generator)[:k] for _ in range(b)])
    down = (randn(e, f, d) * f**-0.5).to(dtype).transpose(1, 2)
    return ExpertsArguments(
        randn(b, d).to(dtype),
        index,
        torch.rand(b, k, generator=generator) + 0.1,
        (randn(e, 2 * f, d) * d**-0.5).to(dtype),
        down,
        torch.rand(e, generator=generator) * 0.3,
        activation,
    )


def run(arguments, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    if reason := BACKENDS.why_refused(backend, arguments):
        pytest.skip(f"{backend}: {reason}")
    return gated_experts(*arguments, backend=backend)


def assert_close(actual, expected):
    scale = expected.float().abs().max(-1, keepdim=True).values.clamp(min=1e-6)
    error = (actual.float() - expected.float()).abs() / scale
    assert float(error.max()) < TOLERANCE[actual.dtype]


def written_out(arguments):
    """The formula with other functions than the reference has."""
    x, index, shares, gate_up, down, thresholds, activation = arguments
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, place in torch.cartesian_prod(*map(torch.arange, index.shape)):
        expert = index[token, place]
        gate, up = F.linear(x[token].double(), gate_up[expert].double()).chunk(2)
        a = ACTIVATIONS[activation](gate)
        a[a.abs() < thresholds[expert]] = 0
        out[token] += shares[token, place] * F.linear(a * up, down[expert].double())
    return out.to(x.dtype)


def test_reference_computes_the_formula():
    arguments = make()
    torch.testing.assert_close(
        gated_experts(*arguments, backend="reference"), written_out(arguments)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", NAMES)
def test_backends_compute_what_the_reference_does(backend, dtype):
    for sizes in (dict(), dict(b=1, k=1, e=1, d=1, f=1), dict(b=1, k=3, f=101, d=16)):
        arguments = make(**sizes, dtype=dtype)
        expected = gated_experts(*arguments, backend="reference")
        assert_close(run(arguments, backend), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", NAMES)
def test_every_activation(backend, activation):
    arguments = make(activation=activation)
    assert_close(run(arguments, backend), gated_experts(*arguments, backend="reference"))


@pytest.mark.parametrize("backend", ["reference", *NAMES])
def test_thresholds_above_everything_drop_everything(backend):
    arguments = make()._replace(thresholds=torch.full((5,), 1e9))
    assert (run(arguments, backend) == 0).all()


@pytest.mark.parametrize("backend", ["reference", *NAMES])
def test_each_expert_has_its_own_threshold(backend):
    arguments = make(b=3)
    one = arguments.thresholds.clone()
    dropped = int(arguments.index[0, 0])
    one[dropped] = 1e9
    out = run(arguments._replace(thresholds=one), backend)
    shares = arguments.shares.masked_fill(arguments.index == dropped, 0)
    expected = gated_experts(*arguments._replace(shares=shares), backend="reference")
    assert_close(out, expected)


@pytest.mark.parametrize("backend", ["reference", *NAMES])
def test_number_that_no_expert_has_adds_nothing(backend):
    arguments = make()
    index = arguments.index.clone()
    index[:, 1] = 5
    shares = arguments.shares.clone()
    shares[:, 1] = 0
    out = run(arguments._replace(index=index), backend)
    expected = gated_experts(*arguments._replace(shares=shares), backend="reference")
    assert_close(out, expected)


@pytest.mark.parametrize("backend", ["reference", *NAMES])
def test_same_expert_twice_counts_twice(backend):
    arguments = make()
    index = arguments.index[:, :1].expand(-1, 2).contiguous()
    once = arguments._replace(
        index=index[:, :1].contiguous(), shares=arguments.shares.sum(1, keepdim=True)
    )
    out = run(arguments._replace(index=index), backend)
    assert_close(out, gated_experts(*once, backend="reference"))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_weights_of_other_experts_and_dropped_neurons_are_not_read(backend):
    arguments = make(b=1)
    gate_up, down = arguments.gate_up.clone(), arguments.down.clone()
    others = [e for e in range(5) if e not in arguments.index[0].tolist()]
    gate_up[others], down[others] = float("nan"), float("nan")
    down = down.transpose(1, 2).contiguous().transpose(1, 2)
    for expert in arguments.index[0].tolist():
        gate = gate_up[expert, :37] @ arguments.x[0]
        dropped = F.silu(gate).abs() < arguments.thresholds[expert] * 0.99
        gate_up[expert, 37:][dropped] = float("nan")
        down[expert].t()[dropped] = float("nan")
    out = run(arguments._replace(gate_up=gate_up, down=down), backend)
    assert_close(out, gated_experts(*arguments, backend="reference"))


def test_prompts_go_to_dense_products():
    assert BACKENDS.backend_for(make(b=9)) == "dense"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(thresholds=torch.zeros(4)), r"expected thresholds \[5\]"),
        (dict(index=torch.zeros(2, 2, dtype=torch.int32)), "expected index"),
        (dict(shares=torch.zeros(2, 3)), "expected shares"),
        (dict(down=torch.zeros(5, 48, 37)), "column-major"),
        (dict(activation="swish"), "activation must be one of"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ShapeError, match=message):
        gated_experts(*make()._replace(**change))


def test_unknown_backend_is_refused():
    with pytest.raises(BackendError, match="backend must be auto or one of"):
        gated_experts(*make(), backend="cuda")


def test_operator_has_a_fake_and_no_gradient():
    arguments = make()
    with torch.device("meta"):
        meta = torch.empty(2, 48)
    assert torch.ops.cats.gated_experts(meta, *arguments[1:]).shape == (2, 48)
    with pytest.raises(BackendError):
        gated_experts(arguments.x.requires_grad_(), *arguments[1:]).sum().backward()


@pytest.mark.parametrize("target", usual(["cuda:80", "cuda:90", "hip:gfx942"], ["cuda:90"]))
def test_kernels_compile_without_a_gpu(target):
    pytest.importorskip("triton")
    script = Path(__file__).with_name("compile_triton.py")
    run = subprocess.run(
        [sys.executable, script, target],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    binary = "cubin" if target.startswith("cuda") else "hsaco"
    assert [binary in line.split() for line in run.stdout.splitlines()] == [True, True]
