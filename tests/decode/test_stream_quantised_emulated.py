"""The stream engine's launches over quantised weights, by an emulator of CUDA."""

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, Phi3Config, Qwen2Config

import cats
from cats.decode.forward import prefill
from cats.decode.state import State
from cats.decode.stream.packed import pack_
from cats.decode.stream.spec import read_spec
from tests.models import make_ids, make_model
from tests.ops.emulator import needs_emulator
from tests.quantised import quantise_

pytestmark = needs_emulator
SIZES = dict(hidden_size=64, intermediate_size=160)


def quantised_model(config, kind, *, sparsity=0.5, group_size=32, only="", **changes):
    model = make_model(config, **SIZES | changes)
    quantise_(model, kind, only, group_size=group_size)
    if sparsity:
        cats.sparsify_(model, cats.calibrate(model, [make_ids(8)], target_sparsity=sparsity))
    return model


def probe(model):
    """Raises where a layer or a token differs from the model's."""
    from cats.decode.stream.chain import Chain
    from cats.decode.stream.probe import probe

    # other lengths change attention only, which reads no weights
    probe(model, pack_(read_spec(model), []), Chain, lengths=(1,))


@pytest.mark.usefixtures("chain_module")
@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (LlamaConfig, "int4"),
        (LlamaConfig, "int8 rows"),
        (Qwen2Config, "int8 rows"),  # biases
        (Gemma2Config, "int4"),  # norms after attention and MLP
        (Phi3Config, "int8 rows"),  # parts of stacked matrices
    ],
)
def test_every_layer_and_a_token_are_those_of_the_model(config, kind):
    probe(quantised_model(config, kind))


@pytest.mark.usefixtures("chain_module")
@pytest.mark.parametrize(
    ("kind", "group_size", "sparsity"),
    [("int4 zeros", None, 0.9), ("int4 shifts", 64, 0)],
)
def test_zero_points_groups_and_sparsity(kind, group_size, sparsity):
    options = dict(num_hidden_layers=1, only="layers")
    probe(quantised_model(LlamaConfig, kind, sparsity=sparsity, group_size=group_size, **options))


@pytest.mark.usefixtures("chain_module")
def test_matrices_of_one_launch_may_be_stored_in_several_ways():
    model = quantised_model(LlamaConfig, "int8 rows", sparsity=0, only="v_proj")
    probe(quantise_(model, "int4", group_size=32))


def test_loaded_codes_are_seen_by_a_chain_that_was_made_before(chain_module):
    model = quantised_model(LlamaConfig, "int4", num_hidden_layers=1)
    state = State(model, model.config, 1, 16)
    with torch.inference_mode():
        prefill(model, state, make_ids(1, 5), 0)
        state.start_at(5)
        chain = chain_module.Chain(pack_(read_spec(model), []), state)
        old = chain.run(8).clone()
    changed = {
        name: tensor ^ 0x55 if name.endswith("codes") else tensor
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(changed)
    with torch.inference_mode():
        new = chain.run(8).clone()
        expected = chain_module.Chain(pack_(read_spec(model), []), state).run(8)
    torch.testing.assert_close(new, expected)
    assert (new - old).norm() > 0.1 * old.norm()
