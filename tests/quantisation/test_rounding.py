import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

import cats
from cats.checkpoint import load_dense
from cats.formats import store_packed_
from cats.quantisation import quantise_, rounded
from cats.undo import unchanged_on_error
from cats.weights import QuantisedLinear
from cats.weights.quantised import unpacked
from tests import models

SIZES = dict(hidden_size=64, intermediate_size=128, head_dim=32)


def by_hand(values, bits, size):
    values = values.numpy()
    codes, scales = np.zeros(values.shape, dtype=int), []
    half = 2 ** (bits - 1)
    for at in range(0, values.shape[1], size):
        group = values[:, at : at + size]
        scale = abs(group).max(1) / np.float32(half - 0.5)
        codes[:, at : at + size] = np.clip(np.round(group / scale[:, None]), -half, half - 1) + half
        scales.append(scale)
    return codes, np.stack(scales, 1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("columns", "size"), [(1, None), (33, None), (33, 16), (64, 32)])
def test_codes_and_scales_are_those_by_hand(bits, columns, size):
    values = torch.randn(7, columns, generator=torch.Generator().manual_seed(0))
    weight = rounded(values, bits=bits, group_size=size)
    codes, scales = by_hand(values, bits, size or columns)
    assert np.array_equal(unpacked(weight.codes, bits, columns).numpy(), codes)
    assert np.array_equal(weight.scales.numpy(), scales)
    weight.check("it")
    step = weight.scales.repeat_interleave(weight.group_size, 1)[:, :columns]
    # the largest number of a group lies half a step beyond the last code
    assert ((weight.dequantised() - values).abs() <= step * 0.5001).all()


def test_scales_and_codes_are_those_of_compressed_tensors():
    pytest.importorskip("compressed_tensors", reason="the format's own library")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    values = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    args = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=16)
    groups = values.view(8, 4, 16)
    scales, _ = calculate_qparams(groups.amin(2), groups.amax(2), args)
    assert torch.equal(rounded(values, bits=4, group_size=16).scales, scales)


def test_a_group_of_zeros_stays_zero():
    weight = rounded(torch.zeros(2, 8), bits=4, group_size=4)
    assert torch.equal(weight.dequantised(), torch.zeros(2, 8))


def test_the_head_is_rounded_to_eight_bits_where_it_is_asked_for():
    model = quantise_(models.make_model(**SIZES), bits=4, group_size=32, head=True)
    assert model.lm_head.matrix.kind == "int8"
    assert model.lm_head.matrix.groups == 1
    kinds = {m.matrix.kind for m in model.model.modules() if type(m) is QuantisedLinear}
    assert kinds == {"int4"}


@pytest.mark.parametrize("kind", [LlamaConfig, Gemma3TextConfig])
def test_a_head_that_is_the_embedding_becomes_a_matrix_of_its_own(kind, tmp_path):
    model = models.make_model(kind, **SIZES, tie_word_embeddings=True)
    table = model.model.embed_tokens.weight.clone()
    quantise_(model, bits=4, group_size=32, head=True)
    assert torch.equal(model.lm_head.matrix.dequantised(), rounded(table, bits=8).dequantised())
    assert torch.equal(model.model.embed_tokens.weight, table)
    ids = models.make_ids()
    expected = models.logits(model, ids)
    model.tie_weights()
    assert torch.equal(models.logits(model, ids), expected)
    store_packed_(model).save_pretrained(tmp_path)
    loaded = load_dense(tmp_path)
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(models.logits(loaded, ids), expected)
    pytest.importorskip("compressed_tensors", reason="transformers needs it")
    assert torch.equal(models.logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), expected)


def test_a_failure_after_the_head_leaves_it_tied():
    model = models.make_model(LlamaConfig, **SIZES, tie_word_embeddings=True)

    def stopped():
        with unchanged_on_error(model):
            quantise_(model, bits=4, group_size=32, head=True)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [*model.all_tied_weights_keys] == ["lm_head.weight"]


def test_eight_bits_lose_less_than_four():
    ids = models.make_ids()
    dense = models.make_model(**SIZES)
    state = dense.state_dict()
    losses = []
    for bits in (8, 4):
        model = models.make_model(**SIZES)
        model.load_state_dict(state)
        quantise_(model, bits=bits)
        losses.append(float((models.logits(model, ids) - models.logits(dense, ids)).norm()))
    assert 0 < losses[0] < 0.2 * losses[1]
    assert cats.metrics.perplexity(model, [ids]) > 0
