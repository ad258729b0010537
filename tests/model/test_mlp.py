import copy

import accelerate
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Phi3Config

import cats
from cats.errors import UnsupportedModelError
from cats.functional import ACTIVATIONS
from cats.model import find_gated_mlps
from tests import models


def test_fingerprint_is_the_same_in_another_dtype_and_differs_for_other_weights():
    (mlp, other) = find_gated_mlps(models.make_model())
    here = mlp.fingerprint()
    largest = here.abs().max()
    half = copy.deepcopy(mlp.module).bfloat16()
    (low,) = find_gated_mlps(models.Body(half))
    assert (low.fingerprint() - here).abs().max() < 0.01 * largest
    assert (other.fingerprint() - here).abs().max() > 0.1 * largest


class IntegerLinear(nn.Module):
    """A quantised layer of a library that keeps its weight as int8 numbers."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = nn.Parameter(linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        values = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(values, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale)


@pytest.mark.parametrize("kind", ["integers", "a tensor class"])
def test_quantised_mlp_is_found_and_has_a_fingerprint(kind):
    model = models.make_model()
    plain = find_gated_mlps(model)
    if kind == "integers":
        for mlp in plain:
            for name in ("gate_proj", "up_proj", "down_proj"):
                setattr(mlp.module, name, IntegerLinear(getattr(mlp.module, name)))
    else:
        models.quantize_(model)
    mlps = find_gated_mlps(model)
    assert [m.name for m in mlps] == [m.name for m in plain]
    first, second = (mlp.fingerprint() for mlp in mlps)
    assert first.isfinite().all()
    assert not torch.allclose(first, second)
    cats.calibrate(model, [models.make_ids()], target_sparsity=0.5)


def test_weight_whose_values_cannot_be_read_is_named():
    class Opaque(models.Int8Tensor):
        dequantize = torch.Tensor.dequantize

    model = models.quantize_(models.make_model())
    (mlp, *_) = find_gated_mlps(model)
    weight = mlp.module.up_proj.weight
    mlp.module.up_proj.weight = nn.Parameter(Opaque(weight.values, weight.scale), False)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.up_proj\.weight.*Opaque"):
        mlp.fingerprint()


def test_offloaded_mlp_has_the_fingerprint_of_its_weights():
    model = models.make_model()
    expected = [mlp.fingerprint() for mlp in find_gated_mlps(model)]
    accelerate.cpu_offload(model, torch.device("cpu"))
    mlps = find_gated_mlps(model)
    assert next(mlps[0].module.parameters()).is_meta
    assert all(map(torch.equal, expected, [mlp.fingerprint() for mlp in mlps]))
    assert next(mlps[0].module.parameters()).is_meta


@pytest.mark.parametrize("config", models.FAMILIES, ids=lambda c: c.__name__)
def test_gate_up_and_down_give_what_the_mlp_gives(config):
    for mlp in find_gated_mlps(models.make_model(config)):
        parts = mlp.operands()
        x = torch.randn(3, 16)
        gate, up = (nn.functional.linear(x, p.weight, p.bias) for p in (parts.gate, parts.up))
        inner = ACTIVATIONS[parts.activation](gate) * up
        with torch.no_grad():
            torch.testing.assert_close(
                nn.functional.linear(inner, parts.down.weight, parts.down.bias), mlp.module(x)
            )
        assert parts.thresholds.shape == (models.F,)
        assert not parts.thresholds.any()


def test_thresholds_of_operands_are_the_own_ones_of_a_fused_mlp():
    model = models.make_model()
    cats.sparsify_(model, cats.calibrate(model, [models.make_ids()], target_sparsity=0.5))
    (mlp, _) = find_gated_mlps(model)
    assert torch.equal(mlp.operands().thresholds, mlp.act.threshold.expand(models.F))
    cats.fuse_(model)
    (mlp, _) = find_gated_mlps(model)
    assert mlp.operands().thresholds.data_ptr() == mlp.act.threshold.data_ptr()


def test_activation_of_operands_is_the_one_that_runs():
    model = models.make_model()
    cats.sparsify_(model, cats.calibrate(model, [models.make_ids()], method="relu"))
    (mlp, _) = find_gated_mlps(model)
    assert (mlp.activation, mlp.operands().activation) == ("silu", "relu")


def test_parts_of_a_stacked_layer_lie_in_its_memory():
    (mlp, _) = find_gated_mlps(models.make_model(Phi3Config))
    stacked = mlp.module.gate_up_proj.weight
    assert mlp.layout.gate == mlp.layout.up == "gate_up_proj"
    assert [*mlp.matrices] == ["gate_up_proj", "down_proj"]
    assert mlp.gate.weight.data_ptr() == stacked.data_ptr()
    assert mlp.up.weight.data_ptr() == stacked[models.F :].data_ptr()
    assert mlp.gate.matrix.bytes + mlp.up.matrix.bytes == stacked.nbytes


@pytest.mark.parametrize("config", [LlamaConfig, Phi3Config])
def test_a_dropped_neuron_saves_a_row_of_up_and_a_column_of_down(config):
    (mlp, _) = find_gated_mlps(models.make_model(config))
    matrix = 4 * 16 * models.F
    assert mlp.bytes == mlp.bytes_read(0) == 3 * matrix
    assert mlp.bytes_read(1) == matrix
    neuron = mlp.up.matrix.row_bytes + mlp.down.matrix.column_bytes
    assert mlp.bytes_read(0.25) == pytest.approx(3 * matrix - 0.25 * models.F * neuron)


def test_mlp_whose_layers_are_not_told_apart_has_bytes_and_no_operands():
    class ShiftedMLP(models.MLP):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))

    (mlp,) = find_gated_mlps(models.Body(ShiftedMLP()))
    assert mlp.layout is None
    assert mlp.bytes_read(1) == mlp.bytes / 3
    with pytest.raises(UnsupportedModelError, match=r"layers\.0.*down\(act"):
        mlp.operands()
