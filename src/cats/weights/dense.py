"""Ordinary floating-point numbers in a plain ``nn.Linear``: what kernels read today."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from cats.weights.base import Order, Weight
from cats.weights.masked import INPUT_THRESHOLD


class Dense(Weight):
    """Numbers of 16, 32 or 64 bits in one ``nn.Parameter``, or in some rows of one."""

    storage = "dense"

    def __init__(self, values: Tensor) -> None:
        """
        Args:
            values: ``[rows, columns]``: the parameter itself, or a view of it.
        """
        self.values = values

    @classmethod
    def of(cls, layer: nn.Module) -> Self | None:
        # a subclass may compute something else; pruning and weight norms keep more tensors
        if type(layer) is not nn.Linear or layer._buffers.keys() - {INPUT_THRESHOLD}:
            return None
        weight = layer._parameters.get("weight")
        if type(weight) is not nn.Parameter or not layer._parameters.keys() <= {"weight", "bias"}:
            return None
        # some quantised tensors keep their numbers in others
        if type(weight.data) is not Tensor or not weight.is_floating_point():
            return None
        return cls(weight) if weight.ndim == 2 and weight.dtype.itemsize >= 2 else None

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows, columns

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)

    @property
    def order(self) -> Order | None:
        if self.values.is_contiguous():
            return "rows"
        return "columns" if self.values.t().is_contiguous() else None

    def dequantised(self) -> Tensor:
        return self.values.detach()

    def part(self, start: int, stop: int) -> Self:
        return type(self)(self.values[start:stop])

    def detached(self) -> Self:
        """The same memory, whatever becomes of the parameter."""
        return type(self)(self.values.detach())
