"""CATS itself: threshold the activated gate (arXiv:2404.08763)."""

from torch import Tensor

from cats.functional import ACTIVATIONS
from cats.methods.base import CountedMethod
from cats.model import GatedMLP


class Cats(CountedMethod):
    """Drop a neuron where ``abs(act(gate(x)))`` is below the layer's percentile."""

    name = "cats"

    def score(self, values: Tensor, activation: str) -> Tensor:
        return ACTIVATIONS[activation](values).abs()

    def apply_(self, mlp: GatedMLP, tensors: dict[str, Tensor]) -> None:
        self._threshold_on(mlp, mlp.dense_act, tensors["threshold"])
