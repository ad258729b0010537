"""What ``save_pretrained`` writes of a model that was quantised here, and who reads it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import cats
from cats import checkpoint, formats
from cats.errors import UnsupportedModelError
from cats.quantisation import quantise_
from cats.weights import QuantisedLinear
from tests import models, quantised

SIZES = dict(hidden_size=64, intermediate_size=128, head_dim=32)
CASES = {
    "int4 groups": dict(bits=4, group_size=32),
    "int4 rows": dict(bits=4, group_size=-1),
    "int8 rows": dict(bits=8),
    "int8 groups": dict(bits=8, group_size=32),
    "int4 and int8": dict(bits=4, group_size=64, head=True),
    "int4 of some layers": dict(bits=4, group_size=64, exclude=("*.0.*",)),
}


def layers(model):
    return {n: m.matrix for n, m in model.named_modules() if isinstance(m, QuantisedLinear)}


@pytest.fixture(params=CASES)
def options(request):
    return CASES[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_the_same_in_cats_and_in_transformers(options, dtype, tmp_path):
    pytest.importorskip("compressed_tensors", reason="the format's own library")
    from compressed_tensors.compressors import BaseCompressor

    model = quantise_(models.make_model(**SIZES).to(dtype), **options)
    formats.store_packed_(model).save_pretrained(tmp_path)
    loaded = checkpoint.load_dense(tmp_path, dtype="auto")
    assert layers(loaded).keys() == layers(model).keys()
    stored = load_file(tmp_path / "model.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for name, weight in layers(model).items():
        again = layers(loaded)[name]
        assert torch.equal(again.codes, weight.codes)
        assert torch.equal(again.scales, weight.scales)
        numbers = weight.dequantised()
        assert torch.equal(again.dequantised(), numbers)
        parts = {
            part: stored[f"{name}.{part}"]
            for part in ("weight_packed", "weight_scale", "weight_shape")
        }
        scheme = plain.get_submodule(name).quantization_scheme
        assert torch.equal(compressor.decompress(parts, scheme)["weight"], numbers)
    ids = models.make_ids()
    assert torch.equal(models.logits(loaded, ids), models.logits(plain, ids))
    # .to(dtype) rounds the frequencies of a model, which loading does not
    if dtype == torch.float32:
        assert torch.equal(models.logits(loaded, ids), models.logits(model, ids))
    # transformers decompressed the layers in this pass
    for name, weight in layers(model).items():
        linear = plain.get_submodule(name)
        if "weight" in dict(linear.named_parameters()):
            assert torch.equal(linear.weight, weight.dequantised())


def test_configuration_says_what_is_quantised_and_what_not(options, tmp_path):
    model = quantise_(models.make_model(**SIZES), **options)
    formats.store_packed_(model).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"
    assert settings["format"] == "pack-quantized"
    groups = [*settings["config_groups"].values()]
    assert groups[0]["targets"] == ["Linear"]
    if options.get("head"):
        assert groups[1]["targets"] == ["lm_head"]
        assert settings["ignore"] == []
    else:
        assert len(groups) == 1
        assert "lm_head" in settings["ignore"]
        assert ("model.layers.0.mlp.up_proj" in settings["ignore"]) == ("exclude" in options)


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
@pytest.mark.parametrize("head", [False, True])
def test_tied_heads_and_biases_stay(config, head, tmp_path):
    model = models.make_model(config, **SIZES, tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight.detach().clone()
    formats.store_packed_(quantise_(model, bits=4, head=head)).save_pretrained(tmp_path)
    loaded = checkpoint.load_dense(tmp_path)
    assert torch.equal(loaded.model.embed_tokens.weight, embedding)
    if head:  # the embedding keeps its numbers, so that the two are no longer one matrix
        assert isinstance(loaded.lm_head, QuantisedLinear)
    else:
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = models.make_ids()
    assert torch.equal(models.logits(loaded, ids), models.logits(model, ids))


def test_sparse_model_is_saved_and_saved_again(tmp_path):
    model = formats.store_packed_(quantise_(models.make_model(**SIZES), bits=4))
    cats.sparsify_(model, cats.calibrate(model, [models.make_ids()], target_sparsity=0.5))
    model.save_pretrained(tmp_path / "first")
    loaded = cats.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / n / "model.safetensors") for n in ("first", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    ids = models.make_ids(seed=3)
    assert torch.equal(models.logits(loaded, ids), models.logits(model, ids))


@pytest.mark.parametrize("kind", ["int4 zeros", "int4 shifts", "int4 ordered", "float8"])
def test_other_numbers_are_refused(kind):
    model = quantised.quantise_(models.make_model(**SIZES), kind, only="down_proj")
    with pytest.raises(UnsupportedModelError, match="symmetric integers in whole groups"):
        formats.store_packed_(model)
    assert getattr(model.config, "quantization_config", None) is None
