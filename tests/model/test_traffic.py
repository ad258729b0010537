import pytest
import torch
from transformers import LlamaConfig, Phi3Config

import cats
from cats.model.traffic import token_bytes, weight_bytes
from tests import models

MATRIX = 4 * 16 * models.F


@pytest.mark.parametrize("tied", [False, True])
def test_all_weights_are_counted_once(tied):
    model = models.make_model(tie_word_embeddings=tied)
    total = sum(p.nbytes for p in model.parameters())
    assert weight_bytes(model) == total
    table = model.get_input_embeddings().weight.nbytes
    # looked up in, or read as the output head
    assert token_bytes(model) == (total if tied else total - table)


def test_layers_that_share_a_weight_count_it_once():
    model = models.make_model()
    first, second = (layer.mlp for layer in model.model.layers)
    before = weight_bytes(model)
    second.up_proj.weight = first.up_proj.weight
    assert weight_bytes(model) == before - MATRIX


def test_quantised_weights_count_what_is_stored():
    model = models.make_model()
    before = weight_bytes(model)
    models.quantize_(model)
    # of each layer one byte a number and four bytes a row, instead of four bytes a number
    gate, down = 3 * 16 * models.F - 4 * models.F, 3 * 16 * models.F - 4 * 16
    assert weight_bytes(model) == before - 2 * (2 * gate + down)


@pytest.mark.parametrize("config", [LlamaConfig, Phi3Config])
@pytest.mark.parametrize("fused", [False, True])
def test_dropped_neurons_are_not_read(config, fused):
    model = models.make_model(config)
    cats.sparsify_(model, cats.calibrate(model, [models.make_ids()], target_sparsity=0.5))
    if fused:
        cats.fuse_(model)
    shares = {"model.layers.0.mlp.down_proj": 0.5, "model.layers.1.mlp.down_proj": 0.25}
    saved = MATRIX * (0.5 + 0.75)
    assert token_bytes(model, shares) == pytest.approx(token_bytes(model) - saved)
    read = cats.metrics.read_shares(model, [models.make_ids()])
    dropped = cats.metrics.realized_sparsity(model, [models.make_ids()])
    saved = 2 * MATRIX * sum(dropped.values())
    assert token_bytes(model, read) == pytest.approx(token_bytes(model) - saved)


def test_weights_on_meta_are_counted():
    with torch.device("meta"):
        model = models.make_model()
    assert weight_bytes(model) == weight_bytes(models.make_model())
