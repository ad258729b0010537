import pytest
from transformers import BertConfig, GPT2Config

from cats.errors import UnsupportedModelError
from cats.recipes import architecture
from tests import models


def test_sizes_come_from_the_configuration(model):
    sizes = architecture(model.config)
    assert sizes.model == "LlamaForCausalLM"
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    assert sizes.gated_mlps == sizes.layers == model.config.num_hidden_layers
    assert sizes.intermediate_sizes == (model.config.intermediate_size,)
    assert sizes.activations == ("silu",)
    assert sizes.refusal == ""


def test_a_model_without_gated_mlps_says_why():
    sizes = architecture(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=models.VOCABULARY))
    assert (sizes.gated_mlps, sizes.intermediate_sizes) == (0, ())
    assert sizes.refusal


def test_what_is_no_causal_model_is_refused():
    config = BertConfig(num_hidden_layers=1, is_decoder=False)
    config.model_type = "none"
    config.__class__ = type("Unknown", (BertConfig,), {})
    with pytest.raises(UnsupportedModelError, match="no causal model"):
        architecture(config)
