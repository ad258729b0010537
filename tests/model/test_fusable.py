import pytest
import torch
from torch import nn

import cats
from cats.errors import UnsupportedModelError
from cats.model import CatsActivation, find_gated_mlps
from cats.model.fusable import check_fusable, check_memory
from tests import models


def sparse(mlp):
    """The description of an MLP with a threshold."""
    mlp.act_fn = CatsActivation(mlp.act_fn, torch.tensor(0.3))
    (gated_mlp,) = find_gated_mlps(models.Body(mlp))
    return gated_mlp


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_mlp_of_the_plain_formula_is_fusable_in_any_dtype(dtype, bias):
    check_fusable(sparse(models.MLP(bias=bias).to(dtype)))


class Squared(models.MLP):
    """The plain formula where the activation is 0 or 1, as in the probe that tells layers apart."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) ** 2 * self.up_proj(x))


class Shifted(models.MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))


@pytest.mark.parametrize("mlp", [Squared(), Shifted(), models.ClampedMLP()], ids=lambda m: type(m))
def test_another_formula_is_refused(mlp):
    with pytest.raises(UnsupportedModelError, match=r"layers\.0 cannot be fused: .*does not comp"):
        check_fusable(sparse(mlp))


def _wide_bias(mlp):
    mlp.up_proj.bias = nn.Parameter(torch.zeros(models.F, dtype=torch.int32), requires_grad=False)


def _scale(mlp):
    mlp.up_proj.register_buffer("scale", torch.ones(1))


@pytest.mark.parametrize("change", [_wide_bias, _scale])
def test_layer_that_holds_something_else_is_refused(change):
    mlp = models.MLP(bias=True)
    gated_mlp = sparse(mlp)
    change(mlp)
    with pytest.raises(UnsupportedModelError, match=r"up_proj holds .*expected ordinary"):
        check_fusable(gated_mlp)


def test_memory_that_two_tensors_share_is_named():
    model = models.make_model()
    first, second = (layer.mlp for layer in model.model.layers)
    check_memory(model, [first.down_proj.weight])
    second.down_proj.weight.data = first.down_proj.weight.data[:8]
    with pytest.raises(UnsupportedModelError, match=r"0\.mlp\.down_proj.*1\.mlp\.down_proj"):
        check_memory(model, [first.down_proj.weight])
    second.down_proj.weight = first.down_proj.weight
    check_memory(model, [first.down_proj.weight])


def test_dense_mlp_may_be_fusable_too():
    (mlp, _) = find_gated_mlps(models.make_model())
    check_fusable(mlp)
    assert not cats.model.is_sparse(mlp.module)
