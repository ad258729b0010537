"""The CPU kernel of ``cats::rotary``, ``rotary.cpp``, and what it takes."""

from torch import Tensor

from cats.ops.cpu import refuses_operands

__all__ = ["refuses"]


def refuses(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """Why the kernel cannot run a call, or None."""
    if x.dim() != 4 or x.shape[-1] % 2 or x.numel() == 0:
        return f"expected [B, heads, T, even], got {list(x.shape)}"
    expected = [x.shape[0], 1, *x.shape[2:]]
    if cos.shape != sin.shape or list(cos.shape) not in (expected, [1, *expected[1:]]):
        return f"expected angles of {expected}, got {list(cos.shape)} and {list(sin.shape)}"
    return refuses_operands(x, cos, sin)
