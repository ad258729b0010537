from collections import Counter

import pytest
import torch
from transformers import GemmaConfig, Qwen3Config

from cats.decode.cpu_kernels import use_cpu_kernels
from cats.decode.forward import step_inputs, trace_unmasked
from cats.ops import cpu
from tests.decode.test_forward import begun
from tests.models import make_ids, make_model

ATEN, CATS = torch.ops.aten, torch.ops.cats
needs_kernels = pytest.mark.skipif(
    cpu.unavailable() is not None, reason=f"the CPU kernels are not there: {cpu.unavailable()}"
)


def traced(model, ids):
    state, _ = begun(model, ids, ids.shape[1])
    return trace_unmasked(model, state), step_inputs(state, ids.shape[1] + 1)


def counted(graph):
    return Counter(node.target for node in graph.graph.nodes if node.op == "call_function")


def count_modules(model, kind):
    return sum(kind in type(module).__name__ for module in model.modules())


@needs_kernels
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_norms_and_rotations_are_replaced_and_give_the_same(dtype, batch):
    model = make_model().to(dtype)
    with torch.inference_mode():
        graph, inputs = traced(model, make_ids(batch, 9))
        expected, before = graph(*inputs), counted(graph)
        actual, after = use_cpu_kernels(graph)(*inputs), counted(graph)
    assert after[CATS.linear.default] == count_modules(model, "Linear")
    assert after[CATS.rms_norm.default] == count_modules(model, "RMSNorm")
    # of the queries and of the keys of each layer
    assert after[CATS.rotary.default] == 2 * model.config.num_hidden_layers
    for replaced in (ATEN.linear.default, ATEN.rsqrt.default, ATEN.neg.default):
        assert replaced in before
        assert replaced not in after
    limit = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(actual, expected, rtol=limit, atol=limit)


@needs_kernels
def test_norms_of_another_formula_stay():
    with torch.inference_mode():
        graph, inputs = traced(make_model(GemmaConfig), make_ids(1, 9))
        expected = graph(*inputs)
        torch.testing.assert_close(use_cpu_kernels(graph)(*inputs), expected)
    assert CATS.rms_norm.default not in counted(graph)
    assert CATS.rotary.default in counted(graph)


@needs_kernels
def test_norms_of_queries_and_keys_are_replaced():
    model = make_model(Qwen3Config)
    with torch.inference_mode():
        graph, inputs = traced(model, make_ids(1, 9))
        expected = graph(*inputs)
        torch.testing.assert_close(use_cpu_kernels(graph)(*inputs), expected)
    assert counted(graph)[CATS.rms_norm.default] == count_modules(model, "RMSNorm")


@needs_kernels
def test_written_weight_is_seen():
    model = make_model()
    with torch.inference_mode():
        graph, inputs = traced(model, make_ids(1, 9))
        use_cpu_kernels(graph)
        before = graph(*inputs)
        model.lm_head.weight.mul_(2)
        model.model.norm.weight.mul_(2)
        torch.testing.assert_close(graph(*inputs), 4 * before)


@needs_kernels
def test_what_the_kernels_do_not_take_stays():
    with torch.inference_mode():
        graph, _ = traced(make_model().half(), make_ids(1, 9))
        before = counted(graph)
        assert counted(use_cpu_kernels(graph)) == before
        graph, _ = traced(make_model(), make_ids(9, 9))
        before = counted(graph)[ATEN.linear.default]
        assert counted(use_cpu_kernels(graph))[ATEN.linear.default] == before


def test_without_kernels_nothing_changes(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", lambda: "not built")
    with torch.inference_mode():
        graph, _ = traced(make_model(), make_ids(1, 9))
        before = graph.code
        assert use_cpu_kernels(graph).code == before
