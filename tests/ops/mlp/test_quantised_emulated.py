"""The CUDA kernel of quantised gated MLPs on a CPU, by an emulator."""

import pytest
import torch

from cats.errors import ShapeError, UnsupportedModelError
from cats.ops.quantised import ZeroMode
from tests.ops.emulator import emulated_kernels, imagine_gpu, needs_emulator
from tests.ops.mlp.quantised_cases import check, make_mlp, run

pytestmark = needs_emulator
CONSTANT, ZEROS, SHIFTS = ZeroMode
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture
def mlp(monkeypatch):
    """Launches on an imaginary GPU of two multiprocessors."""
    from cats.ops.mlp.cuda import quantised

    imagine_gpu(monkeypatch, multiprocessors=2, shared_bytes=100 * 1024)
    with emulated_kernels(monkeypatch):
        yield quantised


# Each set of macros is one run of the compiler, so tests share these sizes: more neurons than two
# blocks keep in their rings.
MANY = {
    4: dict(bits=4, hidden=128, neurons=523, group_size=64),
    8: dict(bits=8, hidden=128, neurons=523, group_size=64, scale_dtype=F32),
}


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
@pytest.mark.parametrize(
    ("bits", "hidden", "neurons", "group_size", "zero_mode", "scale_dtype", "activation"),
    [
        (4, 256, 160, 32, CONSTANT, F16, "silu"),
        (4, 520, 150, 64, ZEROS, BF16, "gelu"),
        (4, 1160, 70, 128, SHIFTS, F32, "gelu_tanh"),
        (4, 136, 33, 0, CONSTANT, F16, "relu"),
        (8, 256, 90, 0, CONSTANT, F32, "silu"),
        (8, 328, 75, 32, ZEROS, F16, "gelu"),
        (8, 640, 40, 128, SHIFTS, BF16, "relu"),
    ],
)
def test_output_is_that_of_the_dequantised_mlp(
    mlp, bits, hidden, neurons, group_size, zero_mode, scale_dtype, activation, sparsity
):
    case = make_mlp(
        bits=bits,
        hidden=hidden,
        neurons=neurons,
        group_size=group_size,
        zero_mode=zero_mode,
        scale_dtype=scale_dtype,
        activation=activation,
        sparsity=sparsity,
    )
    check(run(mlp, case), case)


@pytest.mark.parametrize("multiprocessors", [1, 3, 40])
@pytest.mark.parametrize("bits", MANY)
def test_every_neuron_is_taken_once_by_any_number_of_blocks(mlp, bits, multiprocessors):
    case = make_mlp(**MANY[bits], sparsity=0.4)
    check(run(mlp, case, multiprocessors=multiprocessors), case)


def test_down_may_have_more_bits_than_gate_and_up(mlp):
    case = make_mlp(bits=4, down_bits=8, hidden=264, neurons=50, group_size=32, sparsity=0.5)
    check(run(mlp, case), case)


def test_biases_are_added_before_the_activation(mlp):
    case = make_mlp(**MANY[4], biases=True, sparsity=0.5)
    check(run(mlp, case), case)


def test_nothing_is_added_where_all_neurons_are_dropped(mlp):
    case = make_mlp(**MANY[4], sparsity=0.0)
    case.thresholds.fill_(1e9)
    assert not run(mlp, case).any()


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_products_of_any_size_keep_their_precision(mlp, size):
    case = make_mlp(**MANY[8], up_size=size, sparsity=0.0)
    check(run(mlp, case), case)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_scale_of_gate_that_is_not_finite_shows(mlp, bad):
    case = make_mlp(**MANY[4], sparsity=0.5, bad_gate_scale=bad)
    assert not run(mlp, case).isfinite().any()


def test_matrices_that_do_not_belong_together_are_refused(mlp):
    case = make_mlp(bits=4, hidden=128, neurons=40, sparsity=0.5)
    other = make_mlp(bits=4, hidden=128, neurons=48, sparsity=0.5)
    with pytest.raises(ShapeError, match="gate has 40 rows"):
        run(mlp, case, down=other.down)
    with pytest.raises(ShapeError, match="one layout"):
        run(mlp, case, up=make_mlp(bits=8, hidden=128, neurons=40).up)


def test_rows_that_do_not_fit_are_refused(mlp):
    with pytest.raises(UnsupportedModelError, match="do not fit"):
        run(mlp, make_mlp(bits=8, hidden=8192, neurons=8))
