"""The arguments of ``cats::packed_linear``, in one object that every backend takes."""

from typing import NamedTuple

import torch
from torch import Tensor

from cats.errors import ShapeError
from cats.ops.quantised import RowLayout

__all__ = ["PackedLinearArguments", "check_packed", "check_vector", "check_x"]


class PackedLinearArguments(NamedTuple):
    """A linear layer whose matrix is stored in packed rows of codes.

    Attributes:
        x: ``[B, columns]``; bfloat16, float16 or float32.
        rows: ``[N, pitch]``, uint8: codes, scales and zero points of each row.
        bias: ``[N]`` in the dtype of ``x``, or None.
        layout: How a row is packed.
        arithmetic: The dtype in which the format of the checkpoint makes numbers of codes. Backends
            that write the matrix out compute in it, bit for bit; others sum in float32.
    """

    x: Tensor
    rows: Tensor
    bias: Tensor | None
    layout: RowLayout
    arithmetic: torch.dtype

    def check(self) -> None:
        """
        Raises:
            ShapeError: If a shape, dtype, device or layout does not fit.
        """
        x, layout = self.x, self.layout
        check_x(x, layout.columns)
        check_packed("rows", self.rows, layout.pitch, x.device)
        if self.bias is not None:
            check_vector("bias", self.bias, len(self.rows), x.dtype, x.device)


def check_x(x: Tensor, columns: int) -> None:
    """Raise ShapeError for inputs that are not contiguous floating-point rows of this length."""
    if x.ndim != 2 or x.shape[1] != columns or not x.dtype.is_floating_point:
        raise ShapeError(
            f"expected x [B, {columns}] in floating point, got {list(x.shape)} {x.dtype}"
        )
    if not x.is_contiguous():
        raise ShapeError("x must be contiguous: call .contiguous()")


def check_packed(name: str, tensor: Tensor, pitch: int, device: torch.device) -> None:
    """Raise ShapeError for rows or columns that are not bytes of this pitch on the device."""
    fits = tensor.ndim == 2 and tensor.shape[1] == pitch and tensor.dtype == torch.uint8
    if not fits or tensor.device != device:
        raise ShapeError(
            f"expected {name} [*, {pitch}] torch.uint8 on {device}, "
            f"got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise ShapeError(f"{name} must be contiguous: kernels read packed bytes one after another")


def check_vector(
    name: str, tensor: Tensor, size: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise ShapeError for a bias or thresholds of another size, dtype, device or layout."""
    if tensor.shape != (size,) or tensor.dtype != dtype or tensor.device != device:
        raise ShapeError(
            f"expected {name} [{size}] {dtype} on {device}, "
            f"got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise ShapeError(f"{name} must be contiguous: call .contiguous() once")
