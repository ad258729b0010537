import pytest
import torch
from transformers import LlamaConfig

from cats.decode.blocks import compile_blocks, find_blocks
from cats.decode.capture import window_of
from cats.decode.forward import prefill, step_inputs, trace_window
from cats.decode.options import resolve
from cats.decode.state import State
from tests.models import FAMILIES, make_ids, make_model


def traced(config, layers):
    """A traced step of a model with so many layers, and its inputs."""
    model = make_model(config, num_hidden_layers=layers)
    ids = make_ids(2, 9)
    state = State(model, model.config, 2, window_of(20))
    options = resolve(model, 9, {"max_new_tokens": 8, "do_sample": False})
    with torch.inference_mode():
        state.begin(ids, torch.ones_like(ids, dtype=torch.bool), 257, options)
        state.advance(prefill(model, state, ids, 0), options)
        return trace_window(model, state, state.capacity), step_inputs(state)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.__name__)
def test_each_layer_is_a_block_and_one_tensor_flows_to_the_next(config):
    graph, _ = traced(config, 4)
    blocks = find_blocks([n for n in graph.graph.nodes if n.op == "call_function"])
    assert len(blocks.ranges) >= 3
    assert len(blocks.outputs[0]) == 1


def test_all_layers_of_a_plain_model_are_calls_of_one_compiled_function():
    graph, inputs = traced(LlamaConfig, 5)
    calls = []

    def compiler(block):
        calls.append(0)
        index = len(calls) - 1

        def counted(*arguments):
            calls[index] += 1
            return block(*arguments)

        return counted

    with torch.inference_mode():
        compile_blocks(graph, compiler)(*inputs)
    assert sorted(calls) == [1, 1, 5]  # head, tail and layers


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("layers", [1, 4])
def test_graph_of_blocks_gives_the_same_bits(config, layers):
    graph, inputs = traced(config, layers)
    with torch.inference_mode():
        expected = graph(*inputs)
        assert torch.equal(compile_blocks(graph, lambda g: g)(*inputs), expected)
