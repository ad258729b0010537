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
    """

    matrix: Weight
    bias: Tensor | None

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
        return cls(matrix, getattr(layer, "bias", None))

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
        return Linear(self.matrix.part(start, stop), bias)
