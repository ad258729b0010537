"""The definition of ``cats::gated_mlp`` in plain PyTorch. Tests compare every backend with it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from cats.functional import ACTIVATIONS, keep_mask
from cats.ops.mlp.arguments import GatedMLPArguments


def gated_mlp(arguments: GatedMLPArguments) -> Tensor:
    """See :func:`cats.ops.gated_mlp`. Computes in float32, in float64 where ``x`` is float64."""
    x, gate, up, down, thresholds, activation, router, *biases, product_thresholds = arguments
    gate_bias, up_bias, down_bias = biases
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32

    def linear(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(y, weight.to(wide), None if bias is None else bias.to(wide))

    a = ACTIVATIONS[activation](linear(x.to(wide), gate, gate_bias))
    u = linear(x.to(wide), up, up_bias)
    routed = a if router == "gate" else u
    # an exact zero adds nothing, so its weights are not read even where it is kept
    h = torch.where(keep_mask(routed, thresholds) & (routed != 0), a * u, 0)
    if product_thresholds is not None:
        h = torch.where(keep_mask(h, product_thresholds), h, 0)
    # a column that no token needs is not read: 0 * inf must not become NaN
    needed = (h != 0).any(0)
    return linear(h, torch.where(needed, down, 0), down_bias).to(x.dtype)


def unavailable() -> str | None:
    """None: it runs wherever PyTorch does."""
    return None


def refuses(arguments: GatedMLPArguments) -> str | None:
    """None: it takes every call."""
    return None
