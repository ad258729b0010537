import copy

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from cats.errors import DataError, UnsupportedModelError
from cats.quantisation import gptq_, quantise_, select
from cats.quantisation.gptq import gptq_rounded
from cats.weights import QuantisedLinear
from tests import models

SIZES = dict(hidden_size=64, intermediate_size=128, head_dim=32)
BLOCKS = models.make_ids(rows=12, length=48)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.make_model(**SIZES)


def inputs_of(model, name, blocks=BLOCKS):
    """What a layer of a model gets, ``[tokens, columns]``."""
    seen = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    models.logits(model, blocks)
    handle.remove()
    return seen[0]


def quantised_layers(model):
    return {n: m.matrix for n, m in model.named_modules() if isinstance(m, QuantisedLinear)}


def test_each_layer_sees_what_the_quantised_layers_before_it_give(model):
    """The second layer's codes follow from inputs of a model whose first layer has codes."""
    original = copy.deepcopy(model)
    calls = []
    found = quantised_layers(gptq_(model, BLOCKS, bits=4, on_layer=lambda: calls.append(1)))
    assert len(calls) == 2
    assert found.keys() == select(original, bits=4).layers.keys()
    mixed = copy.deepcopy(original)
    mixed.model.layers[0] = copy.deepcopy(model.model.layers[0])
    for name, weight in found.items():
        before = original if ".layers.0." in name else mixed
        x = inputs_of(before, name)
        expected = gptq_rounded(
            original.get_submodule(name).weight, x.t() @ x, bits=4, group_size=64
        )
        # sums in another order decide a few numbers otherwise
        assert (expected.codes != weight.codes).float().mean() < 0.01, name


@pytest.mark.parametrize("bits", [4, 8])
def test_outputs_change_less_than_by_rounding(model, bits):
    dense = models.logits(model, BLOCKS)
    rounded = quantise_(copy.deepcopy(model), bits=bits, group_size=32)
    gptq_(model, BLOCKS, bits=bits, group_size=32)
    losses = [float((models.logits(m, BLOCKS) - dense).norm()) for m in (model, rounded)]
    assert losses[0] < losses[1]


@pytest.mark.parametrize(
    "config", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Gemma3TextConfig]
)
def test_families(config):
    window = {"sliding_window": 8} if config in (MistralConfig, Gemma3TextConfig) else {}
    model = models.make_model(config, **SIZES, **window)
    biases = {n: p.clone() for n, p in model.named_parameters() if n.endswith("bias")}
    gptq_(model, BLOCKS, bits=8)
    assert len(quantised_layers(model)) == 14
    assert torch.isfinite(models.logits(model, BLOCKS)).all()
    for name, bias in biases.items():
        assert torch.equal(model.get_parameter(name), bias)


def test_16_bit_models_keep_their_dtype_and_others_layers_their_weights():
    model = models.make_model(**SIZES).bfloat16()
    norm = model.model.layers[0].input_layernorm.weight.clone()
    gptq_(model, BLOCKS, bits=4, exclude=["*.0.*"])
    layers = quantised_layers(model)
    assert {w.dtype for w in layers.values()} == {torch.bfloat16}
    assert all(".layers.1." in name for name in layers)
    assert torch.equal(model.model.layers[0].input_layernorm.weight, norm)
    assert models.logits(model, BLOCKS).dtype == torch.bfloat16
    assert not model.training


def test_the_same_call_gives_the_same_codes(model):
    first, again = (gptq_(copy.deepcopy(model), BLOCKS, bits=4) for _ in range(2))
    for name, weight in quantised_layers(first).items():
        assert torch.equal(weight.codes, quantised_layers(again)[name].codes)


def test_one_block_is_enough(model):
    gptq_(model, BLOCKS[:1], bits=4)
    assert torch.isfinite(models.logits(model, BLOCKS)).all()


def test_layers_that_do_not_follow_one_another_are_refused(model):
    forward = model.model.layers[1].forward
    model.model.layers[0].register_forward_hook(lambda m, args, output: output * 2)
    before = models.logits(model, BLOCKS)
    # a second call of a layer within one pass
    model.model.layers[1].forward = lambda x, **named: forward(
        model.model.layers[0](x, **named), **named
    )
    with pytest.raises(UnsupportedModelError, match="one after the other"):
        gptq_(model, BLOCKS, bits=4)
    del model.model.layers[1].forward
    assert torch.equal(models.logits(model, BLOCKS), before)


def test_arguments_that_differ_between_blocks_are_refused(model):
    def with_own_argument(module, args, named):
        return args, named | {"position_ids": args[0][..., 0].sum()}

    model.model.layers[1].register_forward_pre_hook(with_own_argument, with_kwargs=True)
    with pytest.raises(UnsupportedModelError, match="same arguments"):
        gptq_(model, BLOCKS, bits=4)


def test_a_call_that_fails_leaves_the_model_as_it_was(model):
    before = models.logits(model, BLOCKS)
    calls = []

    def stop():
        calls.append(quantised_layers(model))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gptq_(model, BLOCKS, bits=4, on_layer=stop)
    assert calls[0]
    assert not quantised_layers(model)
    assert torch.equal(models.logits(model, BLOCKS), before)
    with pytest.raises(DataError, match="no tokens"):
        gptq_(model, BLOCKS[:0], bits=4)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(torch.nan)
    with pytest.raises(DataError, match="NaN"):
        gptq_(model, BLOCKS, bits=4)
    assert not quantised_layers(model)
