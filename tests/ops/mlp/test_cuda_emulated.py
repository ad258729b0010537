"""The MLP's CUDA kernel on a CPU, by an emulator: indices, sums and handshakes, without a GPU."""

import pytest
import torch

from cats.ops import GatedMLPArguments
from tests.ops.cases import DTYPES, TOLERANCE, make_inputs, reference_in_double
from tests.ops.emulator import emulated_kernels, imagine_gpu, needs_emulator

pytestmark = needs_emulator


@pytest.fixture
def launch(monkeypatch):
    """One call, after which the workspace must be zero again."""
    from cats.ops.mlp.cuda import launch as module

    memory = torch.zeros(64 * 1024, dtype=torch.int32)
    monkeypatch.setattr(module, "workspace", lambda *_: memory.data_ptr())
    imagine_gpu(monkeypatch, multiprocessors=3, shared_bytes=64 * 1024)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    # private in torch; the launch calls it, since the public functions are slower
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)

    def call(inputs):
        arguments = GatedMLPArguments(*inputs.args())
        out = module.gated_mlp(arguments._replace(down=arguments.down.t().contiguous().t()))
        assert not memory.any()
        return out

    with emulated_kernels(monkeypatch):
        yield call


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_are_those_of_the_reference(launch, dtype, batch, in_order):
    torch.use_deterministic_algorithms(in_order)
    for D, F, options in (
        (64, 257, dict(bias=True, product_sparsity=0.3)),
        (576, 40, dict(per_neuron=True, router="up")),
        (1032, 90, dict(sparsity=0.9, activation="gelu")),
        (8, 5, dict(sparsity=0)),
    ):
        inputs = make_inputs(D, F, dtype=dtype, device=torch.device("cpu"), batch=batch, **options)
        out = launch(inputs)
        torch.testing.assert_close(out.double(), reference_in_double(inputs), **TOLERANCE[dtype])
