"""The CUDA kernel of linear layers on a CPU, by an emulator."""

import pytest
import torch

from tests.ops.emulator import EmulatedFunction, emulated_kernels, imagine_gpu, needs_emulator

pytestmark = needs_emulator


@pytest.fixture
def linear(monkeypatch):
    """Launches on an imaginary GPU of two multiprocessors."""
    from cats.ops.linear import cuda

    imagine_gpu(monkeypatch, multiprocessors=2, shared_bytes=100 * 1024)
    with emulated_kernels(monkeypatch):
        yield cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("width", "rows", "early_parts"),
    # of the last, 61 parts rounded up to 16 bytes would leave nothing for the last part
    [(16, 3, 1), (40, 300, 2), (6000, 70, 3), (6000, 70, 99), (13912, 20, 3)],
)
def test_linear_layer_of_long_rows_is_cut_into_parts(linear, dtype, width, rows, early_parts):
    weight, x = torch.randn(rows, width).to(dtype) / width**0.5, torch.randn(width).to(dtype)
    bias, add = torch.randn(rows).to(dtype), torch.randn(rows)
    out, copy = torch.full((rows,), torch.nan), torch.full((rows,), torch.nan)
    half = rows // 2  # two matrices that lie apart
    second, second_bias = weight[half:].clone(), bias[half:].clone()
    weights, biases = [weight[:half], second], [bias[:half], second_bias]
    vectors = dict(x=x, add=add, out=out, copy=copy)
    launch = linear.launch(weights, biases, **vectors, multiprocessors=2)
    defines = launch.function.defines | {"EARLY_PARTS": early_parts}
    size = dict(threads=launch.function.threads, shared_bytes=launch.function.shared_bytes)
    function = EmulatedFunction(0, "linear/linear.cu", defines, **size)
    function.launch(launch.arguments, blocks=launch.blocks, stream=0, dependent=True)
    expected = weight.double() @ x.double() + bias.double() + add.double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(copy, out)


def test_a_wait_for_ever_is_reported(linear):
    x, out, weight = torch.ones(16), torch.zeros(4), torch.ones(4, 16)
    launch = linear.launch([weight], [None], x=x, out=out, multiprocessors=1)
    defines = dict(DTYPE=2, WIDTH=16, NORMED=0, WARPS=1, STAGES=2, PARTS=1, EARLY_PARTS=1)
    # 32 threads: without the warp that fills the rings
    function = EmulatedFunction(0, "linear/linear.cu", defines, threads=32, shared_bytes=2048)
    with pytest.raises(AssertionError, match="wait for ever"):
        function.launch(launch.arguments, blocks=1, stream=0, dependent=False)
