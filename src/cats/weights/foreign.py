"""Linear layers of other libraries, and wrapped ones: their bytes are known, no kernel takes them.

They run by their own code, which is exact. Quantised layers without a storage here are of this
kind, and so are layers with adapters, pruned ones and ones with a weight norm.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from cats.errors import UnsupportedModelError
from cats.weights.base import Order, Weight, entries
from cats.weights.masked import INPUT_THRESHOLD

# What libraries call the numbers of inputs and outputs; the second is Conv1D of transformers.
_SIZES = (("in_features", "out_features"), ("nx", "nf"))


class Foreign(Weight):
    """Whatever tensors a linear layer holds, its bias left out."""

    storage = "foreign"

    def __init__(self, layer: nn.Module, size: tuple[int, int], rows: range) -> None:
        """
        Args:
            layer: The linear layer.
            size: Its inputs and outputs.
            rows: Which of its outputs are meant.
        """
        self.layer = layer
        self._inputs, self._outputs = size
        self._rows = rows

    @classmethod
    def of(cls, layer: nn.Module) -> Self | None:
        if (size := _size(layer)) is None:
            return None
        weight = cls(layer, size, range(size[1]))
        # a layer without a matrix only says what sizes it has
        return weight if any(t.ndim >= 2 for t in weight.tensors) else None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self._rows), self._inputs

    @property
    def dtype(self) -> torch.dtype:
        parameters, buffers = (
            [t for t in tensors if t.is_floating_point()]
            for tensors in (self.layer.parameters(), self.layer.buffers())
        )
        known = max(parameters or buffers, key=lambda t: t.ndim, default=None)
        return torch.float32 if known is None else known.dtype

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        named = (*self.layer.named_parameters(), *self.layer.named_buffers())
        others = ("bias", INPUT_THRESHOLD)
        return tuple(t for name, t in named if name.rpartition(".")[2] not in others)

    @property
    def order(self) -> Order | None:
        return None

    @property
    def bytes(self) -> int:
        return super().bytes * len(self._rows) // self._outputs

    def dequantised(self) -> Tensor:
        weight = getattr(self.layer, "weight", None)
        # adapters and the like, which the weight alone does not tell
        is_wrapped = any(any(True for _ in c.parameters()) for c in self.layer.children())
        if isinstance(weight, Tensor) and not is_wrapped:
            if type(weight).dequantize is not Tensor.dequantize:
                weight = weight.dequantize()
            if hasattr(self.layer, "nf"):
                weight = weight.t()
            if weight.is_floating_point() and weight.shape == (self._outputs, self._inputs):
                return weight.detach()[self._rows.start : self._rows.stop]
        raise UnsupportedModelError(
            f"the numbers of a {type(self.layer).__name__} cannot be read: load the model with "
            "ordinary weights, and merge adapters first"
        )

    def part(self, start: int, stop: int) -> Self:
        return type(self)(self.layer, (self._inputs, self._outputs), self._rows[start:stop])

    def entries(self, name: str) -> Tensor:
        # of all that is stored, since how the numbers follow from it is not known
        parameters, buffers = (
            [(n, t) for n, t in named if t.ndim >= 2]
            for named in (self.layer.named_parameters(), self.layer.named_buffers())
        )
        picks = [entries(f"{name}.{n}", tensor) for n, tensor in parameters or buffers]
        return torch.stack(picks).sum(0)

    def __repr__(self) -> str:
        kind, (rows, columns) = type(self.layer).__name__, self.shape
        first = self.tensors[0]
        return f"<{kind} [{rows}, {columns}] that holds {type(first).__name__} of {first.dtype}>"


def _size(layer: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer; None for another module."""
    for inputs, outputs in _SIZES:
        if hasattr(layer, inputs) and hasattr(layer, outputs):
            return int(getattr(layer, inputs)), int(getattr(layer, outputs))
    return None
