import pytest
import torch

from cats.decode.forward import step_inputs, trace_unmasked
from cats.decode.linears import stream_linears
from cats.ops import cpu
from tests.decode.test_forward import begun
from tests.models import make_ids, make_model

needs_kernels = pytest.mark.skipif(
    cpu.unavailable() is not None, reason=f"the CPU kernels are not there: {cpu.unavailable()}"
)


def traced(model, ids):
    state, _ = begun(model, ids, ids.shape[1])
    return trace_unmasked(model, state), step_inputs(state, ids.shape[1] + 1)


def targets(graph):
    return {node.target for node in graph.graph.nodes if node.op == "call_function"}


@needs_kernels
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_linear_layer_is_streamed_and_gives_the_same(dtype, batch):
    with torch.inference_mode():
        graph, inputs = traced(make_model().to(dtype), make_ids(batch, 9))
        expected = graph(*inputs)
        actual = stream_linears(graph)(*inputs)
    assert torch.ops.aten.linear.default not in targets(graph)
    assert torch.ops.cats.linear.default in targets(graph)
    limit = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(actual, expected, rtol=limit, atol=limit)


@needs_kernels
def test_written_weight_is_seen():
    model, ids = make_model(), make_ids(1, 9)
    with torch.inference_mode():
        graph, inputs = traced(model, ids)
        stream_linears(graph)
        before = graph(*inputs)
        model.lm_head.weight.mul_(2)
        torch.testing.assert_close(graph(*inputs), 2 * before)


@needs_kernels
def test_what_the_kernel_does_not_take_stays():
    with torch.inference_mode():
        for model, batch in ((make_model(), 9), (make_model().half(), 1)):
            graph, _ = traced(model, make_ids(batch, 9))
            stream_linears(graph)
            assert torch.ops.cats.linear.default not in targets(graph)


def test_without_kernels_nothing_changes(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", lambda: "not built")
    with torch.inference_mode():
        graph, _ = traced(make_model(), make_ids(1, 9))
        before = graph.code
        assert stream_linears(graph).code == before
