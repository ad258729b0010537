import json

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

import cats
from cats.errors import UnsupportedModelError
from cats.evaluation.profile import BINS, profile
from tests import models


@pytest.fixture
def batch():
    return models.make_ids(8, 32)


def outputs(model, batch):
    """The outputs of the first activation module, ``[8, 32, F]``."""
    seen = []
    act = model.model.layers[0].mlp.act_fn
    handle = act.register_forward_hook(lambda m, args, out: seen.append(out))
    models.logits(model, batch)
    handle.remove()
    return seen[0]


def test_dense_swiglu_has_no_zeros_and_its_mass_near_zero(model, batch):
    result = profile(model, [batch])
    assert [layer.activation for layer in result.layers] == ["silu", "silu"]
    for layer in result.layers:
        assert layer.zero < 1e-3
        assert sum(layer.histogram) == pytest.approx(1)
        assert layer.histogram[0] > 3 * layer.histogram[BINS // 2]
    assert result.tokens == 8 * 32


def test_relu_model_shows_its_natural_sparsity(batch):
    model = models.make_model(LlamaConfig, hidden_act="relu")
    for layer in profile(model, [batch]).layers:
        assert layer.zero == pytest.approx(0.5, abs=0.1)


def test_shares_are_those_of_the_outputs(model, batch):
    config = cats.calibrate(model, [batch], target_sparsity=0.5)
    cats.sparsify_(model, config)
    layer, second = profile(model, [batch], near=0.3).layers
    assert second.name == "model.layers.1.mlp.act_fn"
    a = outputs(model, batch)
    zero = a == 0
    assert layer.zero == pytest.approx(zero.float().mean().item())
    assert layer.zero == pytest.approx(0.5, abs=0.02)
    assert layer.near_zero == pytest.approx((a.abs() < 0.3).float().mean().item())
    assert layer.threshold == pytest.approx(float(config.thresholds["model.layers.0.mlp"]))
    pairs = zero.view(4, 2, 32, -1).all(1).float().mean().item()
    assert layer.union[2] == pytest.approx(pairs)
    assert layer.union[8] == pytest.approx(zero.all(0).float().mean().item())
    again = (~zero[:, 1:] & ~zero[:, :-1]).sum() / (~zero[:, 1:]).sum()
    assert layer.overlap == pytest.approx(again.item())
    by_position = zero.float().mean((0, 2)).view(16, 2).mean(1)
    torch.testing.assert_close(torch.tensor(layer.by_position), by_position)


def test_profile_of_two_batches_is_that_of_both(model, batch):
    model = cats.sparsify_(model, cats.calibrate(model, [batch], target_sparsity=0.5))
    at_once, halves = profile(model, [batch]), profile(model, batch.split(4))
    assert at_once.by_token == pytest.approx(halves.by_token)
    for one, two in zip(at_once.layers, halves.layers, strict=True):
        assert (one.zero, one.overlap) == pytest.approx((two.zero, two.overlap))
        assert 8 in one.union
        assert 8 not in two.union


SMALL = dict(vocab_size=models.VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)


GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **SMALL)
OPT = OPTConfig(
    hidden_size=16,
    ffn_dim=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    word_embed_proj_dim=16,
    max_position_embeddings=64,
    **SMALL,
)


@pytest.mark.parametrize(
    ("config", "kind", "zeros"),
    [(GPT2, "gelu_tanh", 0), (OPT, "relu", 0.5)],
    ids=["GPT-2", "OPT"],
)
def test_ungated_mlps_are_profiled(config, kind, zeros, batch):
    result = profile(AutoModelForCausalLM.from_config(config).eval(), [batch])
    assert [layer.activation for layer in result.layers] == [kind, kind]
    for layer in result.layers:
        assert layer.zero == pytest.approx(zeros, abs=0.15)


def test_fused_model_is_refused(model, batch):
    cats.fuse_(cats.sparsify_(model, cats.calibrate(model, [batch], target_sparsity=0.5)))
    with pytest.raises(UnsupportedModelError, match="unfuse_"):
        profile(model, [batch])


def test_saved_profile_is_json_with_version_and_kind(model, batch, tmp_path):
    profile(model, [batch]).save(tmp_path / "profile.json", model="tiny")
    block = json.loads((tmp_path / "profile.json").read_text())
    assert (block["version"], block["kind"], block["model"]) == (1, "profile", "tiny")
    assert len(block["layers"]) == 2


def test_offloaded_model_is_profiled_as_the_one_in_memory(model, batch):
    expected = profile(model, [batch])
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert profile(model, [batch]) == expected
