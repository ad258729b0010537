"""The MLP's CUDA kernel on a CPU, by an emulator: indices, sums and handshakes, without a GPU."""

import pytest
import torch

from tests.ops.cases import DTYPES, TOLERANCE, make_inputs, reference_in_double
from tests.ops.emulator import EmulatedFunction, imagine_gpu, needs_emulator

pytestmark = needs_emulator


@pytest.fixture
def launch(monkeypatch):
    """One call; the workspace must be zero again behind it."""
    from cats.ops.cuda import kernel

    memory = torch.zeros(64 * 1024, dtype=torch.int32)
    monkeypatch.setattr(kernel, "Function", EmulatedFunction)
    monkeypatch.setattr(kernel, "workspace", lambda *_: memory.data_ptr())
    imagine_gpu(monkeypatch, multiprocessors=3, shared_bytes=64 * 1024)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    kernel._kernel.cache_clear()

    def call(inputs):
        gate_is_router = inputs.router == "gate"
        branches = [(inputs.gate, inputs.gate_bias), (inputs.up, inputs.up_bias)]
        router, other = branches if gate_is_router else branches[::-1]
        out = kernel.launch(
            inputs.x, *router, *other, inputs.down.t().contiguous().t(), inputs.down_bias,
            inputs.thresholds, inputs.product_thresholds,
            activation=inputs.activation, gate_is_router=gate_is_router,
        )  # fmt: skip
        assert not memory.any()
        return out

    yield call
    kernel._kernel.cache_clear()


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


def test_a_wait_for_ever_is_reported():
    function = EmulatedFunction(
        0, "linear",
        dict(DTYPE=2, WIDTH=16, NORMED=0, WARPS=1, STAGES=2, PARTS=1, EARLY_PARTS=1),
        threads=32, shared_bytes=2048,  # without the warp that fills the rings
    )  # fmt: skip
    from cats.decode.stream.chain import _LINEAR

    x, out = torch.ones(16), torch.zeros(4)
    weight = torch.ones(4, 16)
    arguments = _LINEAR.pack(
        bytes(48), x.data_ptr(), weight.data_ptr(), *[0] * 6, out.data_ptr(), 0, 4, 4, 4, 1
    )
    with pytest.raises(AssertionError, match="wait for ever"):
        function.launch(arguments, blocks=1, stream=0, dependent=False)
