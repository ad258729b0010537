import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn

import cats
from cats.errors import ShapeError
from cats.model import CatsActivation, activation_kind
from tests import models

KINDS = {
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "relu": nn.ReLU(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_activation_is_recognised_by_its_values(kind):
    assert activation_kind(KINDS[kind]) == kind


@pytest.mark.parametrize("module", [nn.Identity(), nn.Dropout(), nn.Linear(4, 4), nn.Sequential()])
def test_other_modules_are_no_activations(module):
    assert activation_kind(module) is None


CONVERSIONS = {
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "bfloat16 and back": lambda m: m.bfloat16().float(),
    "cpu": lambda m: m.to("cpu", torch.float16),
    "deepcopy": lambda m: copy.deepcopy(m).bfloat16(),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
@pytest.mark.parametrize("threshold", [torch.tensor(0.1234567), torch.rand(models.F)])
def test_threshold_stays_exact_in_float32(convert, threshold):
    act = convert(nn.Sequential(CatsActivation(nn.SiLU(), threshold)))[0]
    assert act.threshold.dtype == torch.float32
    assert torch.equal(act.threshold, threshold)
    assert act._buffers["threshold"] is act.threshold


@pytest.mark.parametrize("assign", [False, True])
def test_threshold_survives_meta_and_a_state_dict(assign):
    model = models.make_model()
    cats.sparsify_(model, cats.calibrate(model, [models.make_ids()], target_sparsity=0.5))
    state = {name: t.clone() for name, t in model.state_dict().items()}
    expected = models.logits(model, models.make_ids(seed=1))
    twin = copy.deepcopy(model).to("meta")
    assert twin.model.layers[0].mlp.act_fn.threshold.is_meta
    if not assign:
        twin.to_empty(device="cpu")
    twin.load_state_dict(state, assign=assign)
    threshold = twin.model.layers[0].mlp.act_fn.threshold
    assert threshold.dtype == torch.float32
    assert torch.equal(threshold, model.model.layers[0].mlp.act_fn.threshold)
    twin.model.rotary_emb = model.model.rotary_emb  # its buffers are not in the state dict
    assert torch.equal(models.logits(twin, models.make_ids(seed=1)), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_activation_and_comparison_happen_in_float32(kind, dtype):
    act = CatsActivation(KINDS[kind], torch.tensor(0.2))
    x = torch.randn(5000).to(dtype)
    y = act(x)
    wide = KINDS[kind](x if dtype == torch.float64 else x.float())
    expected = torch.where(wide.abs() < 0.2000000029802322, 0, wide).to(dtype)
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    assert (y == 0).any()
    assert (y != 0).any()


def test_activation_shows_its_threshold():
    assert "0.25" in repr(CatsActivation(nn.SiLU(), torch.tensor(0.25)))
    assert "[3]" in repr(CatsActivation(nn.SiLU(), torch.rand(3)))
    assert "[]" in repr(CatsActivation(nn.SiLU(), torch.tensor(0.25)).to("meta"))


def test_number_and_vector_thresholds_load_into_each_other():
    number, vector = torch.tensor(0.25), torch.rand(5)
    for own, loaded in itertools.product((number, vector), repeat=2):
        for assign in (False, True):
            act = CatsActivation(nn.SiLU(), own)
            act.load_state_dict({"threshold": loaded.to(torch.float64)}, assign=assign)
            assert torch.equal(act.threshold.expand(5), loaded.expand(5))
            assert act.threshold.dtype == torch.float32
    with pytest.raises(RuntimeError, match="size mismatch"):
        CatsActivation(nn.SiLU(), vector).load_state_dict({"threshold": torch.rand(4)})


def test_threshold_for_another_number_of_neurons_is_an_error():
    with pytest.raises(ShapeError, match="one for each neuron"):
        CatsActivation(nn.SiLU(), torch.rand(3)).widen_(4)


def test_activation_that_an_earlier_release_pickled_is_loaded(monkeypatch):
    act, file = CatsActivation(nn.SiLU(), torch.tensor(0.25)), io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(CatsActivation, "__module__", "cats.mlp")
        torch.save(nn.Sequential(act), file)
    assert b"cats.mlp" in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)[0]
    assert type(loaded) is CatsActivation
    assert torch.equal(loaded.threshold, act.threshold)
    assert pickle.loads(pickle.dumps(loaded)).threshold == 0.25
