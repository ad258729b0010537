"""The arguments of ``cats::gated_experts``, in one object that every backend takes."""

from typing import NamedTuple

import torch
from torch import Tensor

from cats.errors import ShapeError
from cats.functional import ACTIVATIONS

__all__ = ["ExpertsArguments"]


class ExpertsArguments(NamedTuple):
    """The operands and options of one call, in the order of the operator's schema.

    Attributes:
        x: ``[B, D]``; bfloat16, float16 or float32.
        index: ``[B, K]``, int64.
        shares: ``[B, K]``, floating point.
        gate_up: ``[E, 2 * F, D]``, contiguous, in the dtype of ``x``.
        down: ``[E, D, F]``, each expert column-major, in the dtype of ``x``.
        thresholds: ``[E]``, float32.
        activation: A name of :data:`cats.functional.ACTIVATIONS`.
    """

    x: Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple has a method of that name
    shares: Tensor
    gate_up: Tensor
    down: Tensor
    thresholds: Tensor
    activation: str

    @property
    def experts(self) -> int:
        return self.down.shape[0]

    @property
    def neurons(self) -> int:
        return self.down.shape[2]

    def check(self) -> None:
        """Raise ShapeError if a shape, dtype, device, layout or option does not fit."""
        x, down = self.x, self.down
        e, d, f = down.shape if down.ndim == 3 else (-1, -1, -1)
        b, k = self.index.shape if self.index.ndim == 2 else (-1, -1)
        shapes = {
            "down": ((e, d, f), x.dtype),
            "gate_up": ((e, 2 * f, d), x.dtype),
            "x": ((b, d), x.dtype),
            "index": ((b, k), torch.int64),
            "shares": ((b, k), self.shares.dtype),
            "thresholds": ((e,), torch.float32),
        }
        for name, (shape, dtype) in shapes.items():
            tensor: Tensor = getattr(self, name)
            if tensor.shape != shape or tensor.dtype != dtype or tensor.device != x.device:
                raise ShapeError(
                    f"expected {name} {list(shape)} {dtype} on {x.device}, "
                    f"got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
                )
            if name != "down" and not tensor.is_contiguous():
                raise ShapeError(f"{name} must be contiguous: call .contiguous()")
        if not down.transpose(1, 2).is_contiguous():
            raise ShapeError(
                "down must be column-major for each expert: store it once as "
                "w.transpose(1, 2).contiguous().transpose(1, 2)"
            )
        if not self.shares.is_floating_point():
            raise ShapeError(f"shares must be floating point, got {self.shares.dtype}")
        if self.activation not in ACTIVATIONS:
            raise ShapeError(
                f"activation must be one of {', '.join(ACTIVATIONS)}; got {self.activation!r}"
            )
