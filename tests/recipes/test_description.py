import pytest
from transformers import BertConfig, GPT2Config

from cats.errors import UnsupportedModelError
from cats.recipes import architecture
from tests import models


def test_sizes_come_from_the_configuration(model):
    found = architecture(model.config)
    assert found.model == "LlamaForCausalLM"
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.gated_mlps == found.layers == model.config.num_hidden_layers
    assert found.intermediate_sizes == (model.config.intermediate_size,)
    assert found.activations == ("silu",)
    assert found.refusal == ""


def test_a_model_without_gated_mlps_says_why():
    found = architecture(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=models.VOCABULARY))
    assert (found.gated_mlps, found.intermediate_sizes) == (0, ())
    assert found.refusal


def test_what_is_no_causal_model_is_refused():
    config = BertConfig(num_hidden_layers=1, is_decoder=False)
    config.model_type = "none"
    config.__class__ = type("Unknown", (BertConfig,), {})
    with pytest.raises(UnsupportedModelError, match="no causal model"):
        architecture(config)
