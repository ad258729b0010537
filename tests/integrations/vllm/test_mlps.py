import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cats.functional import ACTIVATIONS
from cats.integrations.vllm.mlps import activation_kind, find_mlps, is_plain
from tests.integrations.vllm.standins import MLP, ActAndMul, MergedLinear, Model, RowLinear


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_is_told_by_what_it_computes(kind):
    assert activation_kind(ActAndMul(ACTIVATIONS[kind])) == kind


def test_other_modules_are_no_activation_with_a_product():
    class Reversed(ActAndMul):
        def forward_native(self, x):
            return super().forward_native(torch.cat([*x.chunk(2, -1)][::-1], -1))

    clamped = ActAndMul(lambda x: F.silu(x).clamp(max=1))
    for module in (Reversed(), clamped, nn.SiLU(), nn.Identity(), nn.LayerNorm(514)):
        assert activation_kind(module) is None


def test_gated_mlps_are_found_with_their_part():
    model = Model(MLP(), nn.Linear(16, 16), MLP(act=F.relu, rank=1, ranks=2))
    model.other = nn.Sequential(MergedLinear(16, 24), RowLinear(24, 16))
    first, second = find_mlps(model)
    assert (first.name, first.activation) == ("model.layers.0.mlp", "silu")
    assert (first.size, first.rank, first.ranks) == (24, 0, 1)
    assert (second.name, second.activation) == ("model.layers.2.mlp", "relu")
    assert (second.size, second.rank, second.ranks) == (12, 1, 2)
    assert (second.gate_up, second.act, second.down) == ("gate_up_proj", "act_fn", "down_proj")


class Scaled(MLP):
    def forward(self, x):
        return 2 * super().forward(x)


class Clamped(MLP):
    def forward(self, x):
        x, _ = self.gate_up_proj(x)
        x, _ = self.down_proj(self.act_fn(x).clamp(max=3))
        return x


class Residual(MLP):
    def forward(self, x):
        return super().forward(x) + x


class NeedsMore(MLP):
    def forward(self, x, scale):
        return super().forward(x) * scale


class Plain(MLP):
    """As the Transformers backend makes it: no tuples, other names of the calls."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj.return_bias = self.down_proj.return_bias = False

    def forward(self, hidden):
        return self.down_proj(self.act_fn(self.gate_up_proj(hidden)))


@pytest.mark.parametrize(
    ("make", "plain"),
    [(MLP, True), (Plain, True)] + [(m, False) for m in (Scaled, Clamped, Residual, NeedsMore)],
)
def test_only_an_mlp_without_anything_else_is_plain(make, plain):
    mlp = make()
    (found,) = find_mlps(Model(mlp))
    assert is_plain(found) is plain
    assert not any("forward" in vars(child) for child in mlp.children())


def test_forward_of_its_own_that_a_layer_has_stays():
    mlp = MLP()
    own = mlp.down_proj.forward = lambda x: (x, None)
    (found,) = find_mlps(Model(mlp))
    assert is_plain(found)
    assert mlp.down_proj.forward is own
