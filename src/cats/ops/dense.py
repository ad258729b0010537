"""Dense GEMMs with the thresholded activation: prefill, and batches too large to gain from it.

Computes what the unfused model computes: linear layers in the dtype of the weights, the activation
and the comparison in float32.
"""

from torch import Tensor
from torch.nn import functional as F

from cats import ops
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
    # a compiler fuses the plain operators itself
    if x.is_cuda and not ops.is_for_compiler() and ops.why_unavailable("triton") is None:
        from cats.ops.triton.prefill import thresholded_product as product
    else:
        product = thresholded_product
    h = product(g, u, thresholds, activation, router, product_thresholds)
    return F.linear(h, down, down_bias)


def thresholded_product(
    g: Tensor,
    u: Tensor,
    thresholds: Tensor,
    activation: str,
    router: str,
    product_thresholds: Tensor | None,
) -> Tensor:
    """``keep(act(g)) * u`` (or ``act(g) * keep(u)``), ``[B, F]``, in the dtype of ``g``."""
    a = ACTIVATIONS[activation](g.float())
    if router == "gate":
        a = cats_activation(a, thresholds)
    else:
        u = cats_activation(u, thresholds)
    # where the router is zero the other branch is not read elsewhere: 0 * inf must not become NaN
    h = (a.to(g.dtype) * u).masked_fill((a if router == "gate" else u) == 0, 0)
    return h if product_thresholds is None else cats_activation(h, product_thresholds)


def unavailable() -> str | None:
    """None: it runs wherever PyTorch does."""
    return None


def refuses(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> str | None:
    """None: it takes every call."""
    return None
