import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig

import cats
from cats.errors import ConfigError, UnsupportedModelError
from cats.fusion import fused_mlps
from cats.model import Layout, find_gated_mlps
from tests import models

KINDS = {
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "relu": nn.ReLU(),
}


@pytest.mark.parametrize("config", models.FAMILIES, ids=lambda c: c.__name__)
def test_every_layer_of_every_family_is_found(config):
    mlps = find_gated_mlps(models.make_model(config))
    assert [mlp.name for mlp in mlps] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    kind = "gelu_tanh" if "Gemma" in config.__name__ else "silu"
    assert {mlp.activation for mlp in mlps} == {kind}
    assert {(mlp.hidden_size, mlp.intermediate_size) for mlp in mlps} == {(16, models.F)}


@pytest.mark.parametrize("config", models.FAMILIES, ids=lambda c: c.__name__)
def test_model_on_meta_is_probed_with_random_weights(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(**models.SIZES))
    assert len(find_gated_mlps(model)) == 2
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_model_of_any_dtype_is_found(dtype):
    assert len(find_gated_mlps(models.make_model().to(dtype))) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_gates_of_every_activation_are_found_with_and_without_bias(kind, bias):
    (mlp,) = find_gated_mlps(models.Body(models.MLP(KINDS[kind], bias=bias)))
    assert (mlp.name, mlp.activation) == ("layers.0", kind)


def test_mlp_that_clamps_is_found():
    assert len(find_gated_mlps(models.Body(models.ClampedMLP()))) == 1


@pytest.mark.parametrize(
    ("mlp", "reason"),
    [
        (models.TwiceMLP(), "its activation runs 2 times"),
        (models.AdditiveMLP(), "its output depends on the input even where"),
        (models.ShiftedAtLargeInputsMLP(), "its output depends on the input even where"),
        (models.MLP(models.UnknownActivation()), "its activation UnknownActivation is none of"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_module_of_another_form_is_refused_with_its_name_and_the_reason(mlp, reason):
    with pytest.raises(UnsupportedModelError) as caught:
        find_gated_mlps(models.Body(models.MLP(), mlp))
    message = str(caught.value)
    assert "layers.1" in message
    assert type(mlp).__name__ in message
    assert reason in message


OPT = OPTConfig(
    hidden_size=16,
    ffn_dim=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    vocab_size=64,
    word_embed_proj_dim=16,
)
GPT2 = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64)


@pytest.mark.parametrize("config", [OPT, GPT2], ids=["OPT", "GPT2"])
def test_model_without_a_gate_is_refused(config):
    with pytest.raises(UnsupportedModelError, match="no gated MLP"):
        find_gated_mlps(AutoModelForCausalLM.from_config(config))


def test_activation_shared_by_two_mlps_is_refused():
    act = nn.SiLU()
    model = models.Body(models.MLP(act), models.MLP(act))
    with pytest.raises(UnsupportedModelError, match=r"layers\.1.*shares.*layers\.0"):
        find_gated_mlps(model)


def test_excluded_modules_are_left_out():
    model = models.make_model()
    names = [mlp.name for mlp in find_gated_mlps(model, exclude=["*layers.0*"])]
    assert names == ["model.layers.1.mlp"]
    # one that would be refused may be excluded
    body = models.Body(models.MLP(), models.TwiceMLP())
    assert [mlp.name for mlp in find_gated_mlps(body, exclude=["layers.1"])] == ["layers.0"]


def test_one_pattern_may_be_given_without_a_list():
    names = [m.name for m in find_gated_mlps(models.make_model(), exclude="model.layers.0.mlp")]
    assert names == ["model.layers.1.mlp"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("*.0.mpl", r"'\*\.0\.mpl' matches no MLP .* like 'model.layers.0.mlp'"),
        (["*.0.*", "*.1.*"], r"\*\.0\.\* \*\.1\.\* leaves no MLP"),
    ],
)
def test_patterns_that_match_nothing_or_everything_are_refused(patterns, message):
    with pytest.raises(ConfigError, match=message):
        find_gated_mlps(models.make_model(), exclude=patterns)


@pytest.mark.parametrize("refused", [False, True])
def test_probe_changes_neither_modes_nor_random_state_nor_hooks(refused):
    mlp = models.TwiceMLP() if refused else models.MLP()
    mlp.dropout = nn.Dropout(0.5)
    mlp.act_fn.eval()
    model = models.Body(models.MLP(), mlp).train()
    mlp.up_proj.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    weights = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    if refused:
        with pytest.raises(UnsupportedModelError):
            find_gated_mlps(model)
    else:
        find_gated_mlps(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(model.state_dict()[name], w) for name, w in weights.items())
    assert not any(module._forward_hooks for module in model.modules())


def test_random_activation_does_not_change_the_random_state():
    model = models.Body(models.MLP(), models.MLP(nn.RReLU()))
    state = torch.get_rng_state()
    with pytest.raises(UnsupportedModelError, match="RReLU"):
        find_gated_mlps(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_mlps_of_a_fused_model_are_those_that_it_was_made_of():
    model = models.make_model()
    plain = find_gated_mlps(model)
    cats.sparsify_(model, cats.calibrate(model, [models.make_ids()], target_sparsity=0.5))
    cats.fuse_(model)
    gated = find_gated_mlps(model)
    assert [(m.name, m.module, m.layout) for m in gated] == [
        (m.name, m.module, m.layout) for m in plain
    ]
    assert [m.module for m in gated] == [fused.original for _, fused in fused_mlps(model)]


class Packed(nn.Module):
    """A linear layer that keeps its codes in a buffer, as GPTQ and AWQ layers do."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("scales", scale.reshape(1, 1))
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.qweight * self.scales)


def test_layers_that_keep_their_codes_in_buffers_are_found():
    model = models.make_model()
    for layer in model.model.layers:
        for name, child in list(layer.mlp.named_children()):
            if isinstance(child, nn.Linear):
                setattr(layer.mlp, name, Packed(child))
    first, second = find_gated_mlps(model)
    assert first.layout == Layout("gate_proj", "up_proj", "down_proj")
    assert not torch.allclose(first.fingerprint(), second.fingerprint())
    assert first.bytes == 3 * (16 * models.F + 4)
