"""The chain of the stream engine on a CPU, by an emulator of CUDA."""

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, Qwen2Config

import cats
from cats.benchmarks.timeline import moments
from cats.decode.forward import prefill
from cats.decode.state import State
from cats.decode.stream.spec import read_spec
from cats.errors import UnsupportedModelError
from tests.benchmarks.test_timeline import check_moments
from tests.decode.test_stream import check_greedy_choices, head_sizes
from tests.models import FAMILIES, make_ids, make_model
from tests.ops.emulator import needs_emulator
from tests.thorough import usual

pytestmark = needs_emulator


def sparse_model(config, sparsity=0.5, **changes):
    model = make_model(config, **changes)
    if sparsity:
        cats.sparsify_(model, cats.calibrate(model, [make_ids(8)], target_sparsity=sparsity))
    from cats.decode.stream.layout import lay_out_down

    lay_out_down(read_spec(model), [])
    return model


def probe(model, spec=None, **options):
    """Raises where a layer or a token differs from the model's."""
    from cats.decode.stream.chain import Chain
    from cats.decode.stream.probe import probe

    probe(model, spec or read_spec(model), Chain, **options)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.__name__)
def test_every_layer_and_a_token_are_those_of_the_model(chain_module, config):
    model = sparse_model(config)
    probe(model)


@pytest.mark.parametrize("sparsity", [0, 0.9])
def test_dense_and_very_sparse_layers_are_those_of_the_model(chain_module, sparsity):
    model = sparse_model(LlamaConfig, sparsity)
    probe(model)


def test_other_formula_is_refused(chain_module):
    model = sparse_model(LlamaConfig)
    spec = read_spec(model)
    model.model.layers[1].self_attn.scaling *= 1.1
    with pytest.raises(UnsupportedModelError, match="layer 1"):
        probe(model, spec)


def test_weights_at_odd_addresses_are_refused(chain_module):
    model = sparse_model(LlamaConfig)
    old = model.model.layers[1].self_attn.o_proj.weight
    flat = torch.empty(old.numel() + 1)
    flat[1:].copy_(old.detach().flatten())
    model.model.layers[1].self_attn.o_proj.weight = torch.nn.Parameter(flat[1:].view_as(old))
    with pytest.raises(UnsupportedModelError, match="multiple of 16 bytes"):
        probe(model)


@pytest.mark.parametrize("sizes", usual([(4, 4, 16), (6, 2, 64), (3, 1, 256)], [(4, 4, 16)]))
def test_heads_of_all_sizes_are_those_of_the_model(chain_module, sizes):
    heads, key_heads, head_dim = sizes
    model = sparse_model(LlamaConfig, **head_sizes(heads, key_heads, head_dim))
    probe(model)


# Heads of queries, size of a head, slots of the longest text.
TURNS = [(4, 128, 300), (1, 8, 2100), (1, 128, 300), (2, 64, 300), (3, 64, 300)]


@pytest.mark.parametrize("sizes", usual(TURNS, TURNS[:2]))
def test_turns_of_a_block_give_the_layers_of_the_model(chain_module, monkeypatch, sizes):
    heads, head_dim, slots = sizes
    # private: one block must take many turns, which takes far more slots with several blocks
    monkeypatch.setattr("cats.ops.attention.cuda._MAX_SPLITS", 1)
    changes = head_sizes(heads, 1, head_dim)
    model = sparse_model(LlamaConfig, 0, max_position_embeddings=4096, **changes)
    probe(model.to(torch.bfloat16), lengths=(1, 37, slots))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_layers_are_those_of_the_model(chain_module, dtype):
    model = sparse_model(LlamaConfig, hidden_size=64, intermediate_size=160).to(dtype)
    probe(model)


@pytest.mark.parametrize("config", [Qwen2Config, Gemma2Config])
def test_greedy_tokens_are_those_of_transformers(chain_module, config):
    model, ids = sparse_model(config), make_ids(1, 9)
    # a window that the tokens leave behind, where the family has one
    model.config.sliding_window = 12
    model.generation_config.eos_token_id = None
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
    )
    spec = read_spec(model)
    state = State(model, model.config, 1, 256)
    with torch.inference_mode():
        prefill(model, state, ids[:, :-1], 0)
        state.tokens.copy_(ids[:, -1:])
        state.start_at(8)
        embedded = model.model.embed_tokens(ids[0, 0])
        scale = 4.0 if config is Gemma2Config else 1.0  # the root of the hidden size
        assert embedded.numel() == 16
        chain = chain_module.Chain(spec, state, scale)
        for _ in range(12):
            chain.run_greedily(256, 0)
    assert state.chosen[:12, 0].tolist() == expected[0, 9:].tolist()
    assert int(state.slots) == int(state.positions) == 20


@pytest.mark.parametrize("vocabulary", [257, 20_001])
def test_greedy_choice_is_the_first_of_the_largest(chain_module, vocabulary):
    check_greedy_choices(sparse_model(LlamaConfig, 0, vocab_size=vocabulary))


def test_every_launch_of_a_traced_token_notes_its_events(chain_module):
    model = sparse_model(LlamaConfig, num_hidden_layers=3)
    spec, state = read_spec(model), State(model, model.config, 1, 16)
    with torch.inference_mode():
        prefill(model, state, make_ids(1, 5), 0)
        state.start_at(5)
        expected = chain_module.Chain(spec, state).run(8).clone()
        chain = chain_module.Chain(spec, state, traced=True)
        chain.run_greedily(8, 0)
        assert state.chosen[0] == expected.argmax()
    assert torch.equal(chain.buffers.logits, expected)
    check_moments(moments(chain.stamps))


def test_a_window_that_is_split_gives_the_layers_of_the_model(chain_module):
    probe(sparse_model(Gemma2Config, sliding_window=270, max_position_embeddings=512))


@pytest.mark.parametrize("parts", [1, 4])
def test_parts_that_wait_for_others_give_the_layers_of_the_model(chain_module, monkeypatch, parts):
    # private: the rows of tiny models, 64 bytes, would never be long enough to come in parts
    monkeypatch.setattr("cats.ops.linear.cuda._EARLY_BYTES", 64 * parts)
    probe(sparse_model(LlamaConfig))
