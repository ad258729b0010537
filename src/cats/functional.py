"""The keep-or-drop rule and the activations. Neither is written in Python anywhere else."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# The activations that a gate may have, by the name that the operators take.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def keep_mask(x: Tensor, threshold: Tensor | float) -> Tensor:
    """``not abs(x) < threshold``, compared in float32, or in float64 if ``x`` is; NaN is kept.

    A comparison in bfloat16 would round the threshold, and a kernel that compares in float32 would
    disagree with it on the values next to the threshold.

    Args:
        x: Values of the router, any shape, floating point.
        threshold: A number, or a tensor that broadcasts to ``x``.

    Returns:
        Boolean tensor of the shape of ``x``.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    return ~(wide.abs() < threshold)


def cats_activation(x: Tensor, threshold: Tensor | float) -> Tensor:
    """CATS activation (arXiv:2404.08763): 0 where ``abs(x) < threshold``, else ``x``.

    Args:
        x: Activated gate ``act(gate(x))``, any shape, floating point.
        threshold: Cutoff from calibration, a number or ``[F]``; 0 keeps everything.

    Returns:
        Tensor of the shape and dtype of ``x``. The gradient of a dropped element is 0.
    """
    return x.masked_fill(~keep_mask(x, threshold), 0)
