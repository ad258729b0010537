"""The description of a linear layer: a matrix in any storage, and a bias."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from cats.errors import UnsupportedModelError
from cats.weights import Dense, Weight, weight_of


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer, or some rows of one.

    Attributes:
        matrix: Its weight, ``[rows, columns]``.
        bias: ``[rows]``, or None.
        layer: The module.
        start: The first of these rows in it.
    """

    matrix: Weight
    bias: Tensor | None
    layer: nn.Module
    start: int = 0

    @classmethod
    def of(cls, layer: nn.Module, name: str) -> Linear:
        """
        Raises:
            UnsupportedModelError: If the module is no linear layer; the message uses the name.
        """
        matrix = weight_of(layer)
        if matrix is None:
            raise UnsupportedModelError(
                f"{name} is {type(layer).__name__}, expected a linear layer"
            )
        return cls(matrix, getattr(layer, "bias", None), layer)

    @property
    def weight(self) -> Tensor:
        """The matrix for kernels of dense weights, in the memory of the parameter.

        Raises:
            UnsupportedModelError: If the weight is not dense.
        """
        if not isinstance(self.matrix, Dense):
            raise UnsupportedModelError(
                f"no kernel takes {self.matrix!r}: expected ordinary weights of an nn.Linear "
                "(merge adapters first)"
            )
        return self.matrix.values

    def part(self, start: int, stop: int) -> Linear:
        """The rows from ``start`` to ``stop``, in the same memory."""
        bias = None if self.bias is None else self.bias[start:stop]
        return Linear(self.matrix.part(start, stop), bias, self.layer, self.start + start)

    def again(self) -> Linear:
        """The same rows as the layer stores them now."""
        whole = Linear.of(self.layer, type(self.layer).__name__)
        rows = self.matrix.shape[0]
        return whole if whole.matrix.shape[0] == rows else whole.part(self.start, self.start + rows)
