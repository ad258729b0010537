"""ReLUfication: ReLU instead of the activation ("ReLU Strikes Back", arXiv:2310.04564)."""

import torch
from torch import Tensor, nn

from cats.methods.base import CountedMethod
from cats.model import GatedMLP


class Relu(CountedMethod):
    """Drop a neuron where its gate is negative; there is no target sparsity."""

    name = "relu"
    has_target = False

    def score(self, values: Tensor, activation: str) -> Tensor:
        return torch.relu(values)

    def apply_(self, mlp: GatedMLP, tensors: dict[str, Tensor]) -> None:
        self._threshold_on(mlp, nn.ReLU(), tensors["threshold"])
