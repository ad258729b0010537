import math

import pytest
import torch

import cats
from cats.errors import DataError, UnsupportedModelError
from cats.metrics import perplexity, realized_sparsity
from tests import models


def test_perplexity_is_that_of_a_direct_computation():
    model, ids = models.make_model(), models.make_ids(4, 16)
    logp = models.logits(model, ids).double().log_softmax(-1)
    chosen = [logp[b, t - 1, ids[b, t]] for b in range(4) for t in range(1, 16)]
    expected = math.exp(-float(sum(chosen)) / len(chosen))
    assert perplexity(model, ids.split(3)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_perplexity_ignores_padding(side):
    model, ids = models.make_model(), models.make_ids(1, 10)
    pad = torch.full((1, 6), 256)
    parts = (lambda a, b: (a, b)) if side == "right" else (lambda a, b: (b, a))
    batch = {
        "input_ids": torch.cat(parts(ids, pad), 1),
        "attention_mask": torch.cat(parts(ids * 0 + 1, pad * 0), 1),
    }
    assert perplexity(model, [batch]) == pytest.approx(perplexity(model, [ids]), rel=1e-4)


def test_realised_sparsity_is_a_direct_count():
    model, ids = models.make_model(), models.make_ids()
    cats.sparsify_(model, cats.calibrate(model, [ids], target_sparsity=0.7))
    seen = []
    act = model.model.layers[1].mlp.act_fn
    handle = act.register_forward_hook(lambda m, a, out: seen.append((out == 0).float().mean()))
    models.logits(model, ids)
    handle.remove()
    share = realized_sparsity(model, ids.split(2))["model.layers.1.mlp"]
    assert share == pytest.approx(float(seen[0]), abs=1e-4)


def test_nothing_to_measure_is_refused():
    model = models.make_model()
    with pytest.raises(DataError):
        perplexity(model, [])
    with pytest.raises(DataError):
        perplexity(model, [models.make_ids(2, 1)])
    with pytest.raises(UnsupportedModelError, match="dense"):
        realized_sparsity(model, [models.make_ids()])
