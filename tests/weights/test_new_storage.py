"""A storage of weights is one file: what is defined here is all that a new one needs."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

import cats
from cats import weights
from cats.decode.stream.spec import read_spec
from cats.errors import UnsupportedModelError
from cats.evaluation import InputCounts, Sparse
from cats.evaluation.traffic import mean_share, token_bytes
from cats.finetuning.adapters import target_layers
from cats.model import find_gated_mlps
from tests import models


class Int8Linear(nn.Module):
    """A layer of a library that calls nothing as ``nn.Linear`` does; scales by group of 4."""

    def __init__(self, linear):
        super().__init__()
        grouped = linear.weight.detach().unflatten(1, (-1, 4))
        scales = grouped.abs().amax(2) / 127
        self.register_buffer("codes", (grouped / scales[..., None]).round().to(torch.int8))
        self.register_buffer("scales", scales.half())

    def forward(self, x):
        return nn.functional.linear(x, weights.weight_of(self).dequantised())


class Int8(weights.Weight):
    storage = "int8"

    def __init__(self, codes, scales):
        self._codes, self._scales = codes, scales

    @classmethod
    def of(cls, layer):
        return cls(layer.codes, layer.scales) if type(layer) is Int8Linear else None

    @property
    def shape(self):
        return len(self._codes), self._codes[0].numel()

    @property
    def dtype(self):
        return torch.float32

    @property
    def tensors(self):
        return self._codes, self._scales

    @property
    def order(self):
        return "rows"

    def dequantised(self):
        return (self._codes * self._scales[..., None].float()).flatten(1)

    def part(self, start, stop):
        return type(self)(self._codes[start:stop], self._scales[start:stop])


# a byte a number, and a scale of two bytes for each group of four
MATRIX = 16 * models.F * (1 + 2 / 4)


@pytest.fixture(params=[False, True], ids=["MLPs", "all layers"])
def everywhere(request):
    return request.param


@pytest.fixture
def pair(monkeypatch, everywhere):
    """A model of such weights, and a dense one with the same numbers."""
    monkeypatch.setattr(weights, "STORAGES", [Int8, *weights.STORAGES])
    model, dense = models.make_model(LlamaConfig), models.make_model(LlamaConfig)
    dense.load_state_dict(model.state_dict())
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and (everywhere or ".mlp." in name):
            quantised = Int8Linear(module)
            model.set_submodule(name, quantised)
            with torch.no_grad():
                dense.get_submodule(name).weight.copy_(weights.weight_of(quantised).dequantised())
    return model, dense


@pytest.fixture
def batches():
    return [models.make_ids(4, 32, seed) for seed in range(3)]


def test_mlps_are_described(pair):
    quantised, dense = (find_gated_mlps(model) for model in pair)
    for mlp, twin in zip(quantised, dense, strict=True):
        assert (mlp.name, mlp.layout) == (twin.name, twin.layout)
        assert {m.storage for m in mlp.matrices.values()} == {"int8"}
        assert torch.equal(mlp.fingerprint(), twin.fingerprint())
    assert target_layers(pair[0]) == target_layers(pair[1])


def test_thresholds_are_those_of_the_same_numbers_and_apply_to_either(pair, batches):
    quantised, dense = (cats.calibrate(m, batches, target_sparsity=0.5) for m in pair)
    for name, threshold in quantised.thresholds.items():
        torch.testing.assert_close(threshold, dense.thresholds[name], rtol=0.02, atol=0)
    model, ids = pair[0], models.make_ids(seed=9)
    before = models.logits(model, ids)
    cats.sparsify_(model, quantised)
    for share in cats.metrics.realized_sparsity(model, batches).values():
        assert share == pytest.approx(0.5, abs=0.03)
    cats.sparsify_(pair[1], quantised)
    torch.testing.assert_close(models.logits(model, ids), models.logits(pair[1], ids))
    assert torch.equal(models.logits(cats.densify_(model), ids), before)


def test_bytes_are_those_of_codes_and_scales(pair, everywhere):
    model, dense = pair
    (mlp, _) = find_gated_mlps(model)
    assert mlp.bytes == 3 * MATRIX
    assert mlp.bytes_read(1) == MATRIX
    assert (mlp.up.matrix.row_bytes, mlp.down.matrix.column_bytes) == (24, 24)
    saved = sum(
        2.5 * m.weight.numel()
        for n, m in dense.named_modules()
        if type(m) is nn.Linear and (everywhere or ".mlp." in n)
    )
    assert saved > 0
    assert token_bytes(model) == token_bytes(dense) - saved
    half = {f"{mlp.name}.{name}": 0.5 for name in mlp.matrices}
    assert token_bytes(model, half) == token_bytes(model) - 3 * MATRIX / 2


def test_variants_are_evaluated(pair, batches):
    model, _ = pair
    config = cats.calibrate(model, batches, target_sparsity=0.5)
    counts = InputCounts.collect(model, batches)
    for variant in (Sparse(config), counts.uniform(1 / 3), counts.teal(1 / 3)):
        perplexity, share = variant.measure(model, batches)
        assert perplexity > 1
        assert share == pytest.approx(2 / 3, abs=0.02), variant.label
    assert mean_share(model, {}) == 1


def test_tokens_are_generated(pair, batches):
    model, dense = pair
    config = cats.calibrate(model, batches, target_sparsity=0.5)
    options = dict(engine="eager", max_new_tokens=6, do_sample=False)
    ids = models.make_ids(1, 8)
    actual, expected = (cats.generate(cats.sparsify_(m, config), ids, **options) for m in pair)
    models.assert_same_tokens(dense, actual, expected)


def test_fusing_and_streaming_are_refused_with_the_storage(pair, batches):
    model, _ = pair
    with pytest.raises(UnsupportedModelError, match="of layer 0 is <int8 weight"):
        read_spec(model)
    cats.sparsify_(model, cats.calibrate(model, batches, target_sparsity=0.5))
    with pytest.raises(UnsupportedModelError, match=r"layers\.0.*int8 weight .*no kernel takes"):
        cats.fuse_(model)
