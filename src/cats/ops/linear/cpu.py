"""The CPU kernel of ``cats::linear``, ``linear.cpp``, and what it takes."""

from torch import Tensor

from cats.ops.cpu import MAX_BATCH, refuses_operands

__all__ = ["refuses"]


def refuses(x: Tensor, weight: Tensor) -> str | None:
    """Why the kernel leaves a call to torch, or None; the rule of ``tokens_of`` in linear.cpp."""
    if weight.dim() != 2 or weight.numel() == 0:
        return f"expected a matrix, got {list(weight.shape)}"
    if not 1 <= x.numel() // weight.shape[1] <= MAX_BATCH:
        return f"expected 1 to {MAX_BATCH} tokens, got {list(x.shape)}"
    return refuses_operands(x, weight)
