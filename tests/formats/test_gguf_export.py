"""Files that are written are read by transformers, the package gguf and cats, bit for bit."""

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, Qwen2Config

import cats
from cats import checkpoint, formats
from cats.errors import ConfigError, UnsupportedModelError
from cats.model.traffic import token_bytes, weight_bytes
from cats.smollm2 import split_digits_
from cats.weights import QuantisedEmbedding, are_tied, weight_of
from tests import models

SIZES = dict(hidden_size=64, intermediate_size=96, head_dim=32)


def numbers(model, name):
    """The matrix of a linear layer or embedding of a model, in float32."""
    module = model.get_submodule(name)
    if isinstance(module, QuantisedEmbedding):
        module = module.table
    found = weight_of(module)
    return module.weight.detach() if found is None else found.dequantised()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", formats.GGUF_KINDS)
def test_what_is_read_again_are_the_numbers_of_the_library(kind, tied, tmp_path):
    model = models.make_model(tie_word_embeddings=tied, **SIZES)
    path = tmp_path / "model.gguf"
    formats.export_gguf(model, path, kind=kind)
    again = checkpoint.load_dense(path, dtype=torch.float32)
    table_kind = "q8_0" if kind.startswith("q4") else kind
    for name, tensor in model.state_dict().items():
        module, wanted = name.rpartition(".")[0], tensor.numpy()
        if tensor.ndim == 2:
            is_table = module in ("model.embed_tokens", "lm_head")
            raw = gguf.GGMLQuantizationType[(table_kind if is_table else kind).upper()]
            wanted = gguf.dequantize(gguf.quantize(wanted, raw), raw)
        assert torch.equal(numbers(again, module), torch.from_numpy(np.array(wanted))), name
    dense = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True)
    )
    ids = models.make_ids()
    torch.testing.assert_close(models.logits(again, ids), models.logits(dense, ids))
    assert are_tied(again.get_input_embeddings(), again.get_output_embeddings()) == tied
    assert dense.config.rope_parameters == model.config.rope_parameters


def test_a_table_in_codes_is_in_memory_once(tmp_path):
    path = tmp_path / "model.gguf"
    formats.export_gguf(models.make_model(tie_word_embeddings=True, **SIZES), path, kind="q4_1")
    model = checkpoint.load_dense(path, dtype=torch.float32)
    ids = models.make_ids()
    expected = models.logits(model, ids)
    assert model.model.embed_tokens.table is model.lm_head
    rows, columns = models.VOCABULARY, SIZES["hidden_size"]
    assert model.lm_head.stored.bytes == rows * (columns + 2 * columns // 32)
    # a packed table is looked up in as well
    model.lm_head.pack_rows_()
    torch.testing.assert_close(models.logits(model, ids), expected)
    # a token reads the table once, as the head
    assert token_bytes(model) == weight_bytes(model)
    copied = model.to(torch.bfloat16)
    assert copied.model.embed_tokens(ids).dtype == torch.bfloat16


def test_generation_is_that_of_the_same_numbers(tmp_path):
    path = tmp_path / "model.gguf"
    formats.export_gguf(models.make_model(tie_word_embeddings=True, **SIZES), path, kind="q8_0")
    model = checkpoint.load_dense(path, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True)
    )
    prompt = models.make_ids(rows=1, length=8)
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    actual, expected = (cats.generate(m.eval(), prompt, **options) for m in (model, dense))
    models.assert_same_tokens(dense, actual, expected)


def test_a_tokenizer_is_written_with_the_way_it_splits_numbers(tmp_path):
    tokenizer = models.make_tokenizer(merges=[("x", "y")])
    split_digits_(tokenizer)
    model = models.make_model(**SIZES | {"vocab_size": len(tokenizer) + 2})
    path = tmp_path / "model.gguf"
    formats.export_gguf(model, path, kind="f16", tokenizer=tokenizer)
    reader = gguf.GGUFReader(path)
    assert reader.get_field("tokenizer.ggml.pre").contents() == "smollm"
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    assert len(tokens) == len(tokenizer) + 2
    assert tokens[-1] == f"[PAD{len(tokens) - 1}]"
    text = "In 1234, x = 56."
    again = checkpoint.load_tokenizer(path)
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    digits = [d for d, _ in again.backend_tokenizer.pre_tokenizer.pre_tokenize_str("12")]
    assert digits == ["1", "2"]
    unmended = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    digits = [d for d, _ in unmended.backend_tokenizer.pre_tokenizer.pre_tokenize_str("12")]
    assert digits == ["12"]


def test_models_of_another_form_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(UnsupportedModelError, match="expected a Llama or Mistral"):
        formats.export_gguf(models.make_model(Qwen2Config), path)
    with pytest.raises(UnsupportedModelError, match="16 columns, which are no blocks of 32"):
        formats.export_gguf(models.make_model(), path)
    with pytest.raises(ConfigError, match="got 'q4_k'"):
        formats.export_gguf(models.make_model(**SIZES), path, kind="q4_k")
    yarn = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(UnsupportedModelError, match="of the kind linear"):
        formats.export_gguf(models.make_model(rope_parameters=yarn, **SIZES), path)
    with pytest.raises(UnsupportedModelError, match="q_proj has a bias"):
        formats.export_gguf(models.make_model(LlamaConfig, attention_bias=True, **SIZES), path)
    quantised = cats.quantisation.quantise_(models.make_model(**SIZES), bits=8)
    with pytest.raises(UnsupportedModelError, match="export the dense, unquantised model"):
        formats.export_gguf(quantised, path)
    assert not path.exists()
