"""The arguments of ``cats::gated_mlp``, in one object that every backend takes."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cats.errors import ShapeError
from cats.functional import ACTIVATIONS

__all__ = ["ROUTERS", "GatedMLPArguments"]

ROUTERS = ("gate", "up")


class GatedMLPArguments(NamedTuple):
    """The operands and options of one call, in the order of the operator's schema.

    A tuple, since a frozen dataclass takes five times as long to make: more than a microsecond.

    Attributes:
        x: ``[B, D]``; bfloat16, float16 or float32.
        gate: ``[F, D]``, row-major, in the dtype of ``x`` like every weight and bias.
        up: ``[F, D]``, row-major.
        down: ``[D, F]``, column-major.
        thresholds: ``[F]``, float32, compared with the router's absolute output.
        activation: A name of :data:`cats.functional.ACTIVATIONS`.
        router: One of :data:`ROUTERS`: the branch that is compared, of which all rows are read.
        gate_bias: ``[F]`` or None.
        up_bias: ``[F]`` or None.
        down_bias: ``[D]`` or None.
        product_thresholds: ``[F]``, float32, or None; compared with the product of the branches.
        input_thresholds: ``[D]``, float32, or None; compared with what the router gets of ``x``.
            The router is column-major then.
    """

    x: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    thresholds: Tensor
    activation: str
    router: str = "gate"
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    product_thresholds: Tensor | None = None
    input_thresholds: Tensor | None = None

    def by_role(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Weight and bias of the router, then those of the other branch."""
        if self.router == "gate":
            return self.gate, self.gate_bias, self.up, self.up_bias
        return self.up, self.up_bias, self.gate, self.gate_bias

    def check(self) -> None:
        """Raise ShapeError if a shape, dtype, device, layout or option does not fit."""
        x, gate = self.x, self.gate
        f, d = gate.shape if gate.ndim == 2 else (-1, -1)
        shapes = {
            "x": ((x.shape[0] if x.ndim == 2 else -1, d), x.dtype),
            "gate": ((f, d), x.dtype),
            "up": ((f, d), x.dtype),
            "down": ((d, f), x.dtype),
            "thresholds": ((f,), torch.float32),
            "gate_bias": ((f,), x.dtype),
            "up_bias": ((f,), x.dtype),
            "down_bias": ((d,), x.dtype),
            "product_thresholds": ((f,), torch.float32),
            "input_thresholds": ((d,), torch.float32),
        }
        column_major = ("down",) if self.input_thresholds is None else ("down", self.router)
        for name, (shape, dtype) in shapes.items():
            tensor: Tensor | None = getattr(self, name)
            if tensor is not None:
                _check_tensor(name, tensor, shape, dtype, x.device, name in column_major)
        if self.activation not in ACTIVATIONS:
            raise ShapeError(
                f"activation must be one of {', '.join(ACTIVATIONS)}; got {self.activation!r}"
            )
        if self.router not in ROUTERS:
            raise ShapeError(f"router must be one of {', '.join(ROUTERS)}; got {self.router!r}")


def _check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    is_column_major: bool,
) -> None:
    if is_traceable_wrapper_subclass(tensor):
        raise ShapeError(
            f"expected {name} as an ordinary tensor, got {type(tensor).__name__}: kernels read "
            "memory, and quantised and sharded weights have another layout"
        )
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise ShapeError(
            f"expected {name} {list(shape)} {dtype} on {device}, "
            f"got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )
    if is_column_major:
        if tensor.stride() != (1, shape[0]) and not tensor.t().is_contiguous():
            raise ShapeError(
                f"{name} must be column-major: store it once as w.t().contiguous().t(); where it "
                "was replaced in a fused model, call cats.unfuse_(model), then cats.fuse_(model)"
            )
    elif not tensor.is_contiguous():
        raise ShapeError(
            f"{name} must be contiguous: call .contiguous() once, when the model is loaded"
        )
