"""The definition of ``cats::gated_mlp`` in plain PyTorch. Tests compare every backend with it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from cats.functional import ACTIVATIONS, keep_mask
from cats.ops.mlp.arguments import GatedMLPArguments


def gated_mlp(arguments: GatedMLPArguments) -> Tensor:
    """See :func:`cats.ops.gated_mlp`. Computes in float32, in float64 where ``x`` is float64."""
    x, gate, up, down, thresholds, activation, router, *others = arguments
    gate_bias, up_bias, down_bias, product_thresholds, input_thresholds = others
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32

    def linear(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(y, weight.to(wide), None if bias is None else bias.to(wide))

    is_gate, whole = router == "gate", x.to(wide)
    kept = whole
    if input_thresholds is not None:
        kept = torch.where(keep_mask(x, input_thresholds), whole, 0)
        # a column that no token needs is not read: 0 * inf must not become NaN
        needed = (kept != 0).any(0)
        if is_gate:
            gate = torch.where(needed, gate, 0)
        else:
            up = torch.where(needed, up, 0)
    a = ACTIVATIONS[activation](linear(kept if is_gate else whole, gate, gate_bias))
    u = linear(whole if is_gate else kept, up, up_bias)
    routed = a if is_gate else u
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
