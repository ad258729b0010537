import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)

from cats.errors import UnsupportedModelError
from cats.model import describe_decoder
from tests import models


@pytest.mark.parametrize("config", models.FAMILIES, ids=lambda c: c.__name__)
def test_every_family_is_described(config):
    model = models.make_model(config)
    description = describe_decoder(model)
    assert (description.heads, description.key_heads, description.head_size) == (2, 1, 8)
    assert (description.hidden_size, description.dtype) == (16, torch.float32)
    assert description.head.weight is model.get_output_embeddings().weight
    assert len(description.layers) == 2
    layer = description.layers[1]
    shapes = [getattr(layer, name).matrix.shape for name in ("q", "k", "v", "o")]
    assert shapes == [(16, 16), (8, 16), (8, 16), (16, 16)]
    assert (layer.attention_post_norm is not None) == (config in (Gemma2Config, Gemma3TextConfig))
    assert (layer.q_norm is not None) == (config in (Qwen3Config, Gemma3TextConfig))
    assert layer.weight_offset == ("Gemma" in config.__name__)
    assert layer.mlp.activation == ("gelu_tanh" if "Gemma" in config.__name__ else "silu")
    assert (description.logit_softcap > 0) == (config is Gemma2Config)


def test_projections_of_a_stacked_layer_are_rows_of_it():
    model = models.make_model(Phi3Config)
    layer = describe_decoder(model).layers[0]
    stacked = model.model.layers[0].self_attn.qkv_proj.weight
    rows = torch.cat([layer.q.weight, layer.k.weight, layer.v.weight])
    assert torch.equal(rows, stacked)
    assert layer.v.weight.data_ptr() == stacked[24:].data_ptr()


def test_biases_belong_to_their_rows():
    model = models.make_model(Qwen2Config)
    attention = model.model.layers[0].self_attn
    nn.init.normal_(attention.k_proj.bias)
    layer = describe_decoder(model).layers[0]
    assert layer.k.bias is attention.k_proj.bias
    assert layer.o.bias is None


def test_mlp_is_found_whatever_its_layers_are_called():
    class Other(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.w1, self.w2, self.w3 = mlp.gate_proj, mlp.down_proj, mlp.up_proj
            self.silu = nn.SiLU()

        def forward(self, x):
            return self.w2(self.silu(self.w1(x)) * self.w3(x))

    model = models.make_model(LlamaConfig)
    mlp = model.model.layers[1].mlp
    model.model.layers[1].mlp = Other(mlp)
    operands = describe_decoder(model).layers[1].mlp
    assert operands.gate.weight is mlp.gate_proj.weight
    assert operands.up.weight is mlp.up_proj.weight
    assert operands.down.weight is mlp.down_proj.weight


def test_what_is_not_of_the_common_form_is_named():
    model = models.make_model()
    attention = model.model.layers[1].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj)
    with pytest.raises(UnsupportedModelError, match="q_proj is Sequential"):
        describe_decoder(model)
    model = models.make_model()
    model.model.layers[1].more = models.MLP()
    with pytest.raises(UnsupportedModelError, match="layer 1 has 2 gated MLPs"):
        describe_decoder(model)
    model = models.make_model()
    model.model.layers[0].input_layernorm.variance_epsilon *= 2
    with pytest.raises(UnsupportedModelError, match="the norms of layer 0 differ"):
        describe_decoder(model)
    with pytest.raises(UnsupportedModelError, match="LayerNorm is no root-mean-square norm"):
        describe_decoder(models.make_model(Starcoder2Config))
