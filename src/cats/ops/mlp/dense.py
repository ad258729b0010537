"""Dense GEMMs with the thresholded activation, for prefill and other large batches.

Computes what the unfused model computes: linear layers in the dtype of the weights, the activation
and the comparison in float32.
"""

from torch import Tensor
from torch.nn import functional as F

from cats.functional import ACTIVATIONS, cats_activation
from cats.ops.mlp.arguments import GatedMLPArguments
from cats.ops.mlp.backends import why_unavailable
from cats.ops.watching import is_for_compiler


def gated_mlp(arguments: GatedMLPArguments) -> Tensor:
    """See :func:`cats.ops.gated_mlp`."""
    a = arguments
    kept = a.x if a.input_thresholds is None else cats_activation(a.x, a.input_thresholds)
    of_gate, of_up = (kept, a.x) if a.router == "gate" else (a.x, kept)
    g, u = F.linear(of_gate, a.gate, a.gate_bias), F.linear(of_up, a.up, a.up_bias)
    h = product(g, u, a.thresholds, a.activation, a.router, a.product_thresholds)
    return F.linear(h, a.down, a.down_bias)


def product(
    g: Tensor,
    u: Tensor,
    thresholds: Tensor,
    activation: str,
    router: str,
    product_thresholds: Tensor | None,
) -> Tensor:
    """:func:`thresholded_product`, by one kernel on a GPU."""
    # a compiler fuses the plain operators itself
    if g.is_cuda and not is_for_compiler() and why_unavailable("triton") is None:
        from cats.ops.mlp.triton.prefill import thresholded_product as function
    else:
        function = thresholded_product
    return function(g, u, thresholds, activation, router, product_thresholds)


def thresholded_product(
    g: Tensor,
    u: Tensor,
    thresholds: Tensor,
    activation: str,
    router: str,
    product_thresholds: Tensor | None,
) -> Tensor:
    """``keep(act(g)) * u`` (or ``act(g) * keep(u)``), ``[B, F]``, in the dtype of ``g``.

    Activation and comparisons are in float32. The activation is rounded to the dtype of ``g``
    before the product, as in the unfused model.
    """
    a = ACTIVATIONS[activation](g.float())
    if router == "gate":
        a = cats_activation(a, thresholds)
    else:
        u = cats_activation(u, thresholds)
    # kernels do not read the other branch where the router is 0, so that 0 * inf gives 0
    h = (a.to(g.dtype) * u).masked_fill((a if router == "gate" else u) == 0, 0)
    return h if product_thresholds is None else cats_activation(h, product_thresholds)


def unavailable() -> str | None:
    """None: it runs wherever PyTorch does."""
    return None


def refuses(arguments: GatedMLPArguments) -> str | None:
    """None: it takes every call."""
    return None
