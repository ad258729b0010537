import re

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, MixtralConfig

import cats
from cats.errors import UnsupportedModelError
from cats.families import Family, check_family, page
from cats.families.masked import Gates, masked
from cats.families.tiny import model_types, tiny_model
from tests import models

# One of each form: separate and stacked layers, experts, functions, none.
SAMPLE = {
    "llama": ("yes", "yes", "traced"),
    "glm4": ("yes", "yes", "traced"),
    "lfm2": ("yes", "yes", None),
    "mixtral": ("yes", None, None),
    "qwen2_moe": ("yes", "yes, 2 of 4", None),
    "gpt_oss": ("no activation module", None, None),
    "gpt2": ("it has no gate", None, None),
}


@pytest.mark.parametrize("name", SAMPLE)
def test_family_of_each_form(name):
    sparsify, fuse, engine = SAMPLE[name]
    family = check_family(name)
    assert sparsify in family.sparsify
    assert family.is_gated == (name != "gpt2")
    if fuse is not None:
        assert family.fuse.startswith(fuse)
    if engine is not None:
        assert family.engine == engine


def test_every_family_is_named_and_most_can_be_built():
    names = model_types()
    assert len(names) >= 190
    assert {"llama", "mixtral", "gpt_oss", "phi4_multimodal"} <= {*names}
    with pytest.raises(UnsupportedModelError, match="no tiny model of dbrx"):
        tiny_model("dbrx")


def _gates_of(model):
    with torch.no_grad(), Gates() as gates:
        model(models.make_ids(1, 4))
    return gates.found


class Residual(models.MLP):
    def forward(self, x):
        return x + self.down_proj(F.silu(self.gate_proj(x)))


class OwnSigmoid(models.MLP):
    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj((up + 1) * (gate * torch.sigmoid(gate * 1.7)))


@pytest.mark.parametrize(
    ("mlp", "count"), [(models.MLP, 1), (Residual, 0), (OwnSigmoid, 1), (models.ClampedMLP, 1)]
)
def test_gates_are_found_by_operators_whatever_the_modules_are_called(mlp, count):
    assert len(_gates_of(models.Body(mlp()))) == count


def test_gate_without_threshold_is_not_covered():
    model = models.Body(models.MLP(), models.MLP())
    found = _gates_of(model)
    with torch.no_grad(), masked(model, {"layers.1": torch.tensor(0.1)}) as covered, Gates():
        model(models.make_ids(1, 4))
    assert len(found) == 2
    assert len(found - covered) == 1


@pytest.mark.parametrize("config", [LlamaConfig, MixtralConfig], ids=lambda c: c.__name__)
def test_masked_forward_drops_what_is_small_and_leaves_no_hook(config):
    model = models.make_model(config)
    ids, names = models.make_ids(), [n for n, m in model.named_modules() if hasattr(m, "act_fn")]
    before = models.logits(model, ids)
    with masked(model, dict.fromkeys(names, torch.tensor(0.0))):
        assert torch.equal(models.logits(model, ids), before)
    with masked(model, dict.fromkeys(names, torch.tensor(1e9))):
        assert not torch.allclose(models.logits(model, ids), before, atol=1e-3)
    assert torch.equal(models.logits(model, ids), before)


@pytest.mark.parametrize("threshold", [0.9, 0.0], ids=["other thresholds", "none"])
def test_a_wrong_mask_is_an_error(monkeypatch, threshold):
    forward = cats.model.CatsActivation.forward

    def wrong(self, x):
        kept, self.threshold = self.threshold, torch.tensor(threshold)
        try:
            return forward(self, x)
        finally:
            self.threshold = kept

    monkeypatch.setattr(cats.model.CatsActivation, "forward", wrong)
    with pytest.raises(AssertionError, match="sparse llama differs from the masked forward"):
        check_family("llama")


def test_a_family_that_is_left_dense_is_named(monkeypatch):
    def only_the_first(model, *, exclude=(), names=None, find=cats.model.find_gated_mlps):
        return find(model, exclude=exclude, names=names)[:1]

    monkeypatch.setattr("cats.calibration.collection.find_gated_mlps", only_the_first)
    assert check_family("llama").sparsify == "1 of 2 gates would stay dense"


def test_page_counts_and_numbers_its_notes():
    yes = dict(sparsify="yes", stream="yes", quantised="yes", rows="yes", engine="traced")
    families = [
        Family(model_type="a", gates=2, **yes | {"fuse": "yes"}),
        Family(model_type="b", gates=2, **yes | {"fuse": "no kernel", "rows": "one by one: why"}),
        Family(model_type="c", gates=1, sparsify="it has no activation"),
        Family(model_type="d", sparsify="it has no gate"),
        Family(model_type="e", sparsify="cannot be built"),
    ]
    text = page(families)
    assert "has 5 causal families. 3 of them have gates" in text
    assert "makes 2 of these sparse, and `cats.fuse_` fuses 1." in text
    assert "| `b` | yes | no (1) | traced | yes | yes | no (2) |" in text
    assert "1. no kernel\n2. one by one: why" in text
    assert "- `c`: it has no activation." in text
    assert "- `e`: cannot be built." in text
    assert re.search(r"## Without gates \(1\)\n\n`d`\.", text)
