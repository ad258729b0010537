"""The CUDA backend of ``cats::packed_gated_mlp`` on a CPU, by an emulator."""

import pytest
import torch

from cats.errors import ShapeError
from cats.ops.packed_mlp import cuda
from cats.ops.quantised import ZeroMode
from tests.ops.emulator import emulated_kernels, imagine_gpu, needs_emulator
from tests.ops.packed_cases import Kind, make_mlp

pytestmark = needs_emulator
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture
def call(monkeypatch):
    """The backend on an imaginary GPU of two multiprocessors."""
    imagine_gpu(monkeypatch, multiprocessors=2, shared_bytes=100 * 1024)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    # private in torch; the launch calls it, since the public functions are slower
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    with emulated_kernels(monkeypatch):
        yield cuda.packed_gated_mlp


@pytest.mark.parametrize(
    ("kind", "dtype", "options"),
    [
        (Kind(bits=4, group_size=32, scale_dtype=F16), F32, dict(bias=True)),
        (Kind(bits=4, group_size=64, scale_dtype=BF16, mode=ZeroMode.ZEROS), BF16, {}),
        (Kind(bits=8, scale_dtype=F32), F16, dict(bias=True, activation="gelu_tanh")),
        (Kind(bits=8, group_size=128, mode=ZeroMode.SHIFTS), F32, dict(down=Kind(bits=4))),
    ],
)
def test_output_is_that_of_the_reference(call, kind, dtype, options):
    for sparsity in (0, 0.7):
        arguments, expected = make_mlp(136, 75, kind, dtype=dtype, sparsity=sparsity, **options)
        found = call(arguments)
        assert (found.shape, found.dtype) == (expected.shape, dtype)
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert error < (2e-3 if dtype == F32 else 1e-2)


def make(**options):
    kind = Kind(bits=4, group_size=32, scale_dtype=F16)
    return make_mlp(136, 75, kind, dtype=F32, bias=True, **options)[0]


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_inputs_of_any_size_keep_their_precision(call, size):
    arguments = make(sparsity=0, activation="relu")
    arguments = arguments._replace(gate_bias=None, up_bias=None, down_bias=None)
    # relu is linear: both branches grow with x
    expected = call(arguments).double() * size * size
    found = call(arguments._replace(x=arguments.x * size)).double()
    assert (found - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_show(call, bad):
    arguments = make()
    arguments.x[0, 5] = bad
    assert not call(arguments).isfinite().any()


def test_two_calls_share_no_memory(call):
    arguments = make()
    first = call(arguments)
    kept = first.clone()
    assert torch.equal(call(arguments), first)
    assert torch.equal(first, kept)


def test_with_all_neurons_dropped_the_bias_is_left(call):
    arguments = make(sparsity=1)
    assert torch.equal(call(arguments)[0], arguments.down_bias)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(x=torch.zeros(2, 136)), "one token, got 2"),
        (dict(router="up"), "on the gate alone"),
        (dict(product_thresholds=torch.zeros(75)), "on the gate alone"),
        (dict(x=torch.zeros(1, 136, dtype=torch.float64)), "float32, got torch.float64"),
        ({}, "of 16 bytes"),
        ({}, None),
    ],
)
def test_other_calls_are_left_to_other_backends(change, reason, monkeypatch):
    imagine_gpu(monkeypatch, multiprocessors=2, shared_bytes=100 * 1024)
    arguments = make()._replace(**change)
    if reason == "of 16 bytes":
        shifted = torch.zeros(arguments.up.numel() + 1, dtype=torch.uint8)[1:]
        arguments = arguments._replace(up=shifted.view_as(arguments.up))
    assert "NVIDIA GPU" in cuda.refuses(arguments)
    # as on a GPU: all else is asked of tensors on any device
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    found = cuda.refuses(arguments)
    assert (found is None) if reason is None else (reason in found)


def test_rows_that_do_not_fit_and_deterministic_algorithms_are_refused(monkeypatch):
    imagine_gpu(monkeypatch, multiprocessors=2, shared_bytes=4 * 1024)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert "do not fit" in cuda.refuses(make())
    torch.use_deterministic_algorithms(True)
    assert "deterministic" in cuda.refuses(make())


def test_matrices_that_do_not_belong_together_are_refused(call):
    arguments = make()
    with pytest.raises(ShapeError):
        call(arguments._replace(up=arguments.up[:-1]))
