"""The definition of ``cats::gated_experts`` in PyTorch. Tests compare every backend with it."""

import torch
from torch import Tensor

from cats.functional import ACTIVATIONS, keep_mask
from cats.ops.experts.arguments import ExpertsArguments


def gated_experts(arguments: ExpertsArguments) -> Tensor:
    """See :func:`cats.ops.experts.gated_experts`. Computes in float32, pair by pair."""
    x, index, shares, gate_up, down, thresholds, activation = arguments
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.zeros(x.shape, dtype=wide, device=x.device)
    for token, numbers in enumerate(index.tolist()):
        for place, expert in enumerate(numbers):
            if not 0 <= expert < arguments.experts:
                continue
            gate, up = (gate_up[expert].to(wide) @ x[token].to(wide)).chunk(2)
            a = ACTIVATIONS[activation](gate)
            # an exact zero adds nothing, so its weights are not read even where it is kept
            h = torch.where(keep_mask(a, thresholds[expert]) & (a != 0), a * up, 0)
            # a column that is not needed is not read: 0 * inf must not become NaN
            weights = torch.where(h != 0, down[expert], 0)
            out[token] += shares[token, place].to(wide) * (weights.to(wide) @ h)
    return out.to(x.dtype)


def unavailable() -> str | None:
    """None: it runs wherever PyTorch does."""
    return None


def refuses(arguments: ExpertsArguments) -> str | None:
    """None: it takes every call."""
    return None
