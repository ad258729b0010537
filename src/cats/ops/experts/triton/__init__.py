"""Portable GPU backend: one program takes some neurons of one pair of token and expert.

The kernel reads the numbers of the experts itself, so that the host does not wait for them.
Deterministic: partial sums are added in a fixed order.
"""

from torch import Tensor

from cats.ops.experts.arguments import ExpertsArguments
from cats.ops.mlp.triton import MAX_HIDDEN_SIZE, is_interpreted, unavailable

__all__ = ["MAX_PAIRS", "gated_experts", "refuses", "unavailable"]

# With more pairs, most experts have several tokens, and each reads its weights again.
MAX_PAIRS = 64


def refuses(arguments: ExpertsArguments) -> str | None:
    """Why it leaves this call to another backend, or None."""
    x, index = arguments.x, arguments.index
    if x.device.type != "cuda" and not is_interpreted():
        return f"it needs tensors on a GPU, these are on {x.device}"
    if arguments.down.numel() == 0 or index.numel() == 0:
        return "a tensor is empty"
    if index.numel() > MAX_PAIRS:
        return f"{index.numel()} pairs of token and expert are more than {MAX_PAIRS}"
    if x.shape[1] > MAX_HIDDEN_SIZE:
        return f"the hidden size {x.shape[1]} is larger than {MAX_HIDDEN_SIZE}"
    return None


def gated_experts(arguments: ExpertsArguments) -> Tensor:
    """See :func:`cats.ops.experts.gated_experts`. Two launches, no waiting on the host."""
    from cats.ops.experts.triton import launch

    return launch.gated_experts(arguments)
