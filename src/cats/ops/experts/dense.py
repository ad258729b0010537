"""Dense matrix products, expert by expert, with the thresholded activation: for prompts.

Computes what the experts of transformers compute: products in the dtype of the weights, the
activation and the comparison in float32.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cats.ops.experts.arguments import ExpertsArguments
from cats.ops.mlp.dense import product


def gated_experts(arguments: ExpertsArguments) -> Tensor:
    """See :func:`cats.ops.experts.gated_experts`."""
    x, index, shares, gate_up, down, thresholds, activation = arguments
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert, token, place in pairs_by_expert(index, arguments.experts):
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        limits = thresholds[expert].expand(arguments.neurons)
        h = product(gate.contiguous(), up.contiguous(), limits, activation, "gate", None)
        y = F.linear(h, down[expert]) * shares[token, place, None]
        out.index_add_(0, token, y.float())
    return out.to(x.dtype)


def pairs_by_expert(index: Tensor, experts: int) -> list[tuple[int, Tensor, Tensor]]:
    """Each expert that some token is routed to, with these tokens and the place of their choice."""
    found = []
    for expert in index.unique().tolist():
        if 0 <= expert < experts:
            found.append((expert, *torch.where(index == expert)))
    return found


def unavailable() -> str | None:
    """None: it runs wherever PyTorch does."""
    return None


def refuses(arguments: ExpertsArguments) -> str | None:
    """None: it takes every call."""
    return None
