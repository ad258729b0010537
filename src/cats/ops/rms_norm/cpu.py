"""The CPU kernel of ``cats::rms_norm``, ``rms_norm.cpp``, and what it takes."""

from torch import Tensor

from cats.ops.cpu import refuses_operands

__all__ = ["refuses"]


def refuses(x: Tensor, weight: Tensor) -> str | None:
    """Why the kernel cannot run a call, or None."""
    if weight.shape != x.shape[-1:] or weight.numel() == 0:
        return f"expected a weight of {list(x.shape[-1:])}, got {list(weight.shape)}"
    return refuses_operands(x, weight)
