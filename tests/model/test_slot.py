import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cats
from cats.fusion import fused_mlps
from cats.model import Layout, find_gated_mlps
from tests import models


class InlinedMLP(nn.Module):
    """Names its activation in its forward pass, as that of LFM2 does."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Linear(16, models.F, bias=False)
        self.w3 = nn.Linear(16, models.F, bias=False)
        self.w2 = nn.Linear(models.F, 16, bias=False)

    def forward(self, hidden_states):
        return self.w2(F.silu(self.w1(hidden_states)) * self.w3(hidden_states))


class StackedInlinedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_gate = nn.Linear(16, 2 * models.F)
        self.down = nn.Linear(models.F, 16)

    def forward(self, x):
        up, gate = self.up_gate(x).chunk(2, -1)
        return self.down(up * F.gelu(gate, approximate="tanh"))


class FunctionMLP(models.MLP):
    """Keeps its activation as a function, which is no module."""

    def __init__(self):
        super().__init__()
        del self.act_fn
        self.act_fn = F.silu


class OtherInlinedMLP(InlinedMLP):
    """Has the layers of a gated MLP, and another formula."""

    def forward(self, hidden_states):
        return self.w2(F.silu(self.w1(hidden_states)) * self.w3(hidden_states) * 0.5)


FORMS = {
    InlinedMLP: ("silu", Layout("w1", "w3", "w2"), "w1", "w3", "w2"),
    StackedInlinedMLP: ("gelu_tanh", Layout("up_gate", "up_gate", "down", False), None, None, None),
    FunctionMLP: ("silu", Layout("gate_proj", "up_proj", "down_proj"), None, None, None),
}


def sparse_output(mlp, x, threshold):
    """The formula, written out for each form."""
    if isinstance(mlp, InlinedMLP):
        gate, up, down, act = mlp.w1(x), mlp.w3(x), mlp.w2, F.silu
    elif isinstance(mlp, FunctionMLP):
        gate, up, down, act = mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj, F.silu
    else:
        (up, gate), down = mlp.up_gate(x).chunk(2, -1), mlp.down

        def act(values):
            return F.gelu(values, approximate="tanh")

    a = act(gate)
    return down(torch.where(a.abs() >= threshold, a, 0.0) * up)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_activation_that_is_no_module_is_thresholded_fused_and_restored(form):
    torch.manual_seed(0)
    model = models.Body(form(), form())
    ids, x = models.make_ids(), torch.randn(3, 16)
    kind, layout, *_ = FORMS[form]
    assert [(m.activation, m.layout) for m in find_gated_mlps(model)] == [(kind, layout)] * 2
    with torch.no_grad():
        dense, structure, kinds = model(ids), repr(model), [type(m) for m in model.modules()]
        config = cats.calibrate(model, [ids], target_sparsity=0.6)
        assert repr(model) == structure
        cats.sparsify_(model, config)
        mlp = model.layers[1]
        expected = sparse_output(mlp, x, config.thresholds["layers.1"])
        torch.testing.assert_close(mlp(x), expected)
        assert not torch.allclose(model(ids), dense, atol=1e-2)
        stored = io.BytesIO()
        torch.save(model, stored)
        stored.seek(0)
        for twin in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
            assert torch.equal(twin(ids), model(ids))
        cats.fuse_(model)
        assert len([*fused_mlps(model)]) == 2
        torch.testing.assert_close(model.layers[1](x), expected)
        if form is InlinedMLP:
            torch.testing.assert_close(model.layers[1](hidden_states=x), expected)
        cats.densify_(model)
        assert torch.equal(model(ids), dense)
    assert repr(model) == structure
    assert [type(m) for m in model.modules()] == kinds


def test_thresholds_are_stored_where_those_of_other_families_are(tmp_path):
    model = models.Body(InlinedMLP())
    before = [*model.state_dict()]
    config = cats.calibrate(model, [models.make_ids()], target_sparsity=0.5)
    assert [*config.thresholds] == ["layers.0"]
    cats.sparsify_(model, config)
    assert {*model.state_dict()} - {*before} == {"layers.0.act_fn.threshold"}


def test_another_formula_is_passed_over():
    model = models.Body(models.MLP(), OtherInlinedMLP())
    assert [mlp.name for mlp in find_gated_mlps(model)] == ["layers.0"]


def test_a_call_that_fails_gives_back_the_dense_class(monkeypatch):
    model = models.Body(InlinedMLP(), models.MLP())
    config = cats.calibrate(model, [models.make_ids()], target_sparsity=0.5)

    def fail(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr("cats.apply._record", fail)
    with pytest.raises(RuntimeError):
        cats.sparsify_(model, config)
    assert type(model.layers[0]) is InlinedMLP
    assert not hasattr(model.layers[0], "act_fn")
