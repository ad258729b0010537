import copy
import dataclasses

import pytest
import torch
from torch import nn

import cats
from cats.errors import ConfigError, ModelMismatchError, UnsupportedModelError
from cats.methods import METHODS
from cats.methods.cats import Cats
from cats.model import CatsActivation
from tests import models


def _calibrate(model, target=0.5, **options):
    return cats.calibrate(model, [models.make_ids()], target_sparsity=target, **options)


@pytest.mark.parametrize("config", models.FAMILIES, ids=lambda c: c.__name__)
def test_sparse_changes_the_output_and_densify_restores_it_bit_for_bit(config):
    model, ids = models.make_model(config), models.make_ids(seed=1)
    before, structure = models.logits(model, ids), repr(model)
    config = _calibrate(model)
    assert cats.sparsify_(model, config) is model
    assert not torch.equal(models.logits(model, ids), before)
    assert cats.densify_(model) is model
    assert torch.equal(models.logits(model, ids), before)
    assert repr(model) == structure
    assert not hasattr(model.config, "cats")


def test_sparse_mlp_computes_the_formula():
    torch.manual_seed(3)
    mlp = models.MLP(bias=True)
    model = models.Body(mlp)
    config = cats.calibrate(model, [models.make_ids()], target_sparsity=0.7)
    x = torch.randn(2, 5, 16)
    a = nn.functional.silu(mlp.gate_proj(x))
    kept = a.abs() >= config.thresholds["layers.0"]
    expected = mlp.down_proj(a * kept * mlp.up_proj(x))
    cats.sparsify_(model, config)
    torch.testing.assert_close(mlp(x), expected)
    assert 0.5 < 1 - kept.float().mean() < 0.9


def test_prefill_is_sparse_at_every_position():
    model, ids = models.make_model(), models.make_ids(1, 20, seed=1)
    cats.sparsify_(model, _calibrate(model))
    seen = []
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda m, a, out: seen.append(out))
    models.logits(model, ids)
    share = (seen[0] == 0).float().mean(-1)
    assert share.shape == (1, 20)
    assert (share > 0).all()


def test_second_config_replaces_the_first():
    model = models.make_model()
    half, most = _calibrate(model, 0.5), _calibrate(model, 0.9)
    expected = models.logits(cats.sparsify_(copy.deepcopy(model), most), models.make_ids())
    cats.sparsify_(cats.sparsify_(model, half), most)
    assert torch.equal(models.logits(model, models.make_ids()), expected)
    assert model.config.cats["target_sparsity"] == 0.9
    assert sum(isinstance(m, CatsActivation) for m in model.modules()) == 2


def test_one_threshold_a_neuron_applies_to_each():
    model = models.make_model()
    config = _calibrate(model)
    vector = torch.zeros(models.F)
    vector[::2] = 1e9
    config = dataclasses.replace(config, tensors={n: {"threshold": vector} for n in config.tensors})
    cats.sparsify_(model, config)
    out = model.model.layers[0].mlp.act_fn(torch.ones(3, models.F))
    assert (out[:, ::2] == 0).all()
    assert (out[:, 1::2] != 0).all()


def test_excluded_layer_stays_dense():
    model = models.make_model()
    cats.sparsify_(model, _calibrate(model, exclude=["*.0.*"]))
    sparse = [isinstance(layer.mlp.act_fn, CatsActivation) for layer in model.model.layers]
    assert sparse == [False, True]


def test_training_mode_is_kept():
    model = models.make_model().train()
    cats.sparsify_(model, _calibrate(model))
    assert all(module.training for module in model.modules())


def _renamed(config):
    return {f"x.{name}": tensors for name, tensors in config.tensors.items()}


MISMATCHES = {
    "a layer more": lambda c: c.tensors | {"model.layers.2.mlp": {"threshold": torch.tensor(0.1)}},
    "other names": _renamed,
    "another size": lambda c: {n: {"threshold": torch.rand(models.F + 1)} for n in c.tensors},
    "no MLP": lambda c: c.tensors | {"model.norm": {"threshold": torch.tensor(0.1)}},
}


@pytest.mark.parametrize("change", MISMATCHES.values(), ids=MISMATCHES)
def test_thresholds_of_another_shape_are_refused_and_the_model_left_as_it_was(change):
    model, ids = models.make_model(), models.make_ids()
    config = _calibrate(model)
    cats.sparsify_(model, config)
    before, block = models.logits(model, ids), dict(model.config.cats)
    with pytest.raises(ModelMismatchError, match="calibrate this model"):
        cats.sparsify_(model, dataclasses.replace(config, tensors=change(config)))
    assert torch.equal(models.logits(model, ids), before)
    assert model.config.cats == block


def test_thresholds_of_other_weights_are_refused():
    config = _calibrate(models.make_model())
    other = models.make_model()
    with pytest.raises(ModelMismatchError, match="weights"):
        cats.sparsify_(other, config)
    assert not any(isinstance(m, CatsActivation) for m in other.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_thresholds_apply_to_the_same_model_in_another_dtype(dtype):
    model = models.make_model()
    config = _calibrate(model)
    cats.sparsify_(model.to(dtype), config)
    act = model.model.layers[0].mlp.act_fn
    assert act.threshold.dtype == torch.float32
    assert act.threshold == config.thresholds["model.layers.0.mlp"]


def test_weights_and_their_names_never_change():
    model = models.make_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    cats.sparsify_(model, _calibrate(model))
    after = model.state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    added = {f"model.layers.{i}.mlp.act_fn.threshold" for i in range(2)}
    assert after.keys() - before.keys() == added


def test_tensor_that_the_method_does_not_use_is_refused():
    model = models.make_model()
    config = _calibrate(model)
    tensors = {n: t | {"product_threshold": torch.tensor(0.1)} for n, t in config.tensors.items()}
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.product_threshold"):
        cats.sparsify_(model, dataclasses.replace(config, tensors=tensors))
    assert not any(isinstance(m, CatsActivation) for m in model.modules())


def _refuse_second_mlp(patch, model):
    calls = []

    def apply_(self, mlp, tensors, original=Cats.apply_):
        calls.append(mlp)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        original(self, mlp, tensors)

    patch.setattr(Cats, "apply_", apply_)


def _refuse_memory(patch, model):
    def empty_strided(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    patch.setattr(torch, "empty_strided", empty_strided)


def _refuse_block(patch, model):
    original = type(model.config).__setattr__

    def setattr_(self, name, value):
        if name == "cats":
            raise RuntimeError("a config that cannot change")
        original(self, name, value)

    patch.setattr(type(model.config), "__setattr__", setattr_)


@pytest.mark.parametrize("fails", [_refuse_second_mlp, _refuse_memory, _refuse_block])
def test_sparsify_that_fails_leaves_a_fused_model_as_it_was(fails, monkeypatch):
    model, ids = models.make_model(), models.make_ids()
    half, most = _calibrate(model, 0.5), _calibrate(model, 0.9)
    cats.fuse_(cats.sparsify_(model, half))
    before, modules, block = models.logits(model, ids), [*model.modules()], dict(model.config.cats)
    strides = [p.stride() for p in model.parameters()]
    with monkeypatch.context() as patch:
        fails(patch, model)
        with pytest.raises(RuntimeError):
            cats.sparsify_(model, most)
    assert [*model.modules()] == modules
    assert [p.stride() for p in model.parameters()] == strides
    assert model.config.cats == block
    assert torch.equal(models.logits(model, ids), before)
    cats.sparsify_(model, most)
    assert model.config.cats["target_sparsity"] == 0.9


def test_mismatch_leaves_a_fused_model_fused():
    model, ids = models.make_model(), models.make_ids()
    config = _calibrate(model)
    cats.fuse_(cats.sparsify_(model, config))
    before, modules = models.logits(model, ids), [*model.modules()]
    with pytest.raises(ModelMismatchError):
        cats.sparsify_(model, dataclasses.replace(config, tensors=_renamed(config)))
    assert [*model.modules()] == modules
    assert torch.equal(models.logits(model, ids), before)


def test_hooks_on_the_activation_see_every_threshold():
    model, ids = models.make_model(), models.make_ids()
    half, most = _calibrate(model, 0.5), _calibrate(model, 0.9)
    cats.sparsify_(model, half)
    seen = []
    act = model.model.layers[0].mlp.act_fn
    handle = act.register_forward_hook(lambda m, args, out: seen.append((out == 0).float().mean()))
    cats.sparsify_(model, most)
    seen.clear()
    models.logits(model, ids)
    assert len(seen) == 1
    assert seen[0] > 0.8
    handle.remove()
    models.logits(model, ids)
    assert len(seen) == 1


def test_hook_that_relu_would_drop_is_refused():
    model, ids = models.make_model(), models.make_ids()
    config = cats.calibrate(model, [ids], method="relu")
    model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="hook"):
        cats.sparsify_(model, config)
    assert not any(isinstance(m, CatsActivation) for m in model.modules())


def test_model_without_a_config_gets_thresholds():
    body = models.Body(models.MLP())
    body.config = None
    config = cats.calibrate(body, [models.make_ids()], target_sparsity=0.5)
    cats.densify_(cats.sparsify_(body, config))


def test_thresholds_have_values_where_the_weights_are_on_meta():
    model, ids = models.make_model(), models.make_ids()
    config = _calibrate(model)
    with torch.device("meta"):
        empty = models.make_model()
    cats.sparsify_(empty, config)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict(), strict=False)
    empty.model.rotary_emb = model.model.rotary_emb
    expected = models.logits(cats.sparsify_(model, config), ids)
    assert torch.equal(models.logits(empty, ids), expected)


def test_thresholds_of_the_quantised_model_apply_to_it():
    model, ids = models.quantize_(models.make_model()), models.make_ids()
    dense = models.logits(model, ids)
    config = _calibrate(model)
    cats.sparsify_(model, config)
    assert not torch.equal(models.logits(model, ids), dense)
    assert set(cats.metrics.realized_sparsity(model, [ids]).values()) != {0.0}
    other = models.quantize_(models.make_model())
    with pytest.raises(ModelMismatchError, match="weights"):
        cats.sparsify_(other, config)


def test_a_method_that_stores_other_thresholds_than_it_was_given_is_refused(monkeypatch):
    # a saved model would be made sparse by it again, with what it had stored
    class Rooted(Cats):
        name = "rooted"

        def apply_(self, mlp, tensors):
            super().apply_(mlp, {"threshold": tensors["threshold"].sqrt()})

    monkeypatch.setitem(METHODS, "rooted", Rooted())
    model = models.make_model()
    config = dataclasses.replace(_calibrate(model), method="rooted")
    with pytest.raises(ConfigError, match="must store its tensors unchanged"):
        cats.sparsify_(model, config)
    assert not hasattr(model.config, "cats")
