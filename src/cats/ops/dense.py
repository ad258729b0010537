"""Dense GEMMs with the thresholded activation: prefill, and batches too large to gain from skipping.

Computes what the unfused model computes, bit for bit: linear layers in the dtype of the weights, the
activation and the comparison in float32.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cats.functional import ACTIVATIONS, cats_activation


def gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    thresholds: Tensor,
    activation: str,
    router: str = "gate",
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    product_thresholds: Tensor | None = None,
) -> Tensor:
    """See :func:`cats.ops.gated_mlp`."""
    g, u = F.linear(x, gate, gate_bias), F.linear(x, up, up_bias)
    if router == "gate":
        a = cats_activation(ACTIVATIONS[activation](g.float()), thresholds).to(x.dtype)
    else:
        a, u = ACTIVATIONS[activation](g.float()).to(x.dtype), cats_activation(u, thresholds)
    h = a * u
    if product_thresholds is not None:
        h = cats_activation(h, product_thresholds)
    return F.linear(h, down, down_bias)


def unavailable() -> str | None:
    """None: it runs wherever PyTorch does."""
    return None


def refuses(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> str | None:
    """None: it takes every call."""
    return None
