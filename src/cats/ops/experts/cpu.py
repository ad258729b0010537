"""The CPU backend: the C++ kernel of ``cats::gated_mlp`` on the matrices of each expert."""

import torch
from torch import Tensor

from cats.ops.cpu import MAX_BATCH, unavailable
from cats.ops.experts.arguments import ExpertsArguments
from cats.ops.experts.dense import pairs_by_expert

__all__ = ["gated_experts", "refuses", "unavailable"]


def gated_experts(arguments: ExpertsArguments) -> Tensor:
    """See :func:`cats.ops.experts.gated_experts`."""
    x, index, shares, gate_up, down, thresholds, activation = arguments
    f = arguments.neurons
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert, token, place in pairs_by_expert(index, arguments.experts):
        gate, up = gate_up[expert, :f], gate_up[expert, f:]
        limits = thresholds[expert].expand(f).contiguous()
        y = torch.ops.cats.gated_mlp(x[token], gate, up, down[expert], limits, activation)
        out.index_add_(0, token, y.float() * shares[token, place, None].float())
    return out.to(x.dtype)


def refuses(arguments: ExpertsArguments) -> str | None:
    """Why a call is left to ``dense``, or None."""
    x = arguments.x
    if x.device.type != "cpu":
        return f"expected CPU tensors, got {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"expected float32 or bfloat16, got {x.dtype}"
    if not 1 <= x.shape[0] <= MAX_BATCH:
        return f"expected a batch of 1 to {MAX_BATCH}, got {x.shape[0]}"
    if arguments.down.numel() == 0 or arguments.index.numel() == 0:
        return "a tensor is empty"
    return None
