"""The CPU backend of ``cats::gated_mlp``: C++, for 1 to 8 tokens in float32 or bfloat16."""

import torch
from torch import Tensor

from cats.ops.cpu import MAX_BATCH, unavailable
from cats.ops.mlp.arguments import GatedMLPArguments

__all__ = ["gated_mlp", "refuses", "unavailable"]


def gated_mlp(arguments: GatedMLPArguments) -> Tensor:
    """See :func:`cats.ops.gated_mlp`."""
    out: Tensor = torch.ops.cats.gated_mlp(*arguments, "cpu")
    return out


def refuses(arguments: GatedMLPArguments) -> str | None:
    """Why a call is left to ``dense``, or None; the rule of ``is_taken`` in gated_mlp.cpp."""
    x = arguments.x
    if x.device.type != "cpu":
        return f"expected CPU tensors, got {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"expected float32 or bfloat16, got {x.dtype}"
    if not 1 <= x.shape[0] <= MAX_BATCH:
        return f"expected a batch of 1 to {MAX_BATCH}, got {x.shape[0]}"
    if arguments.gate.numel() == 0:
        return "expected at least one neuron and one input"
    return None
