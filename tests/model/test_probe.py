import copy

import accelerate
import pytest
import torch
from torch import nn

from cats.model import Layout, find_gated_mlps
from cats.model.probe import UNGATED, ProbedMLP, probe
from tests import models


class Renamed(nn.Module):
    """Names that say nothing, in an order that says nothing; gate and up have the same shape."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Linear(models.F, 16)
        self.w2 = nn.Linear(16, models.F)
        self.w3 = nn.Linear(16, models.F)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.w1(self.w2(x) * self.act(self.w3(x)))


class Square(models.MLP):
    """As many neurons as inputs: shapes say nothing."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj, self.gate_proj = (nn.Linear(16, 16) for _ in range(3))


class Stacked(nn.Module):
    def __init__(self, gate_first):
        super().__init__()
        self.both, self.out = nn.Linear(16, 2 * models.F), nn.Linear(models.F, 16)
        self.act = nn.GELU()
        self.gate_first = gate_first

    def forward(self, x):
        first, second = self.both(x).chunk(2, -1)
        gate, up = (first, second) if self.gate_first else (second, first)
        return self.out(self.act(gate) * up)


class Interleaved(Stacked):
    def forward(self, x):
        both = self.both(x)
        return self.out(self.act(both[..., ::2]) * both[..., 1::2])


class WithSpare(models.MLP):
    """One more layer of the shape of gate and up, in front of them; what it gives is dropped."""

    def __init__(self):
        super().__init__()
        layers = dict(self.named_children())
        for name in layers:
            delattr(self, name)
        self.spare = nn.Linear(16, models.F)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        self.spare(x)
        return super().forward(x)


LAYOUTS = {
    "a spare layer": (WithSpare(), Layout("gate_proj", "up_proj", "down_proj")),
    "named": (models.MLP(), Layout("gate_proj", "up_proj", "down_proj")),
    "renamed": (Renamed(), Layout("w3", "w2", "w1")),
    "square": (Square(), Layout("gate_proj", "up_proj", "down_proj")),
    "stacked": (Stacked(True), Layout("both", "both", "out")),
    "stacked the other way": (Stacked(False), Layout("both", "both", "out", False)),
    "interleaved": (Interleaved(True), None),
    "clamped": (models.ClampedMLP(), Layout("gate_proj", "up_proj", "down_proj")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mlp", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_layers_are_told_apart_by_what_they_do(mlp, layout, dtype):
    mlp = copy.deepcopy(mlp).to(dtype)
    name = "act_fn" if hasattr(mlp, "act_fn") else "act"
    neurons = 16 if isinstance(mlp, Square) else models.F
    assert probe(mlp, name) == ProbedMLP(16, neurons, layout)
    assert not any(m._forward_hooks for m in mlp.modules())


def test_layers_are_told_apart_where_there_are_no_weights():
    mlp, layout = LAYOUTS["renamed"]
    assert probe(copy.deepcopy(mlp).to("meta"), "act").layout == layout
    model = models.make_model()
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert all(m.layout == LAYOUTS["named"][1] for m in find_gated_mlps(model))


def test_layers_of_quantised_weights_are_told_apart():
    model = models.quantize_(models.make_model())
    assert all(m.layout == LAYOUTS["named"][1] for m in find_gated_mlps(model))


class Ungated(models.MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)))


def test_mlp_without_a_gate_is_known_as_such():
    assert probe(Ungated(), "act_fn") == UNGATED
