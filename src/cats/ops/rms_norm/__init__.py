"""The operator ``cats::rms_norm``: an RMSNorm of a decode step."""

import torch
from torch import Tensor

from cats.ops.definition import define

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x [..., D]``, ``weight [D]``: as in Llama, rounded before the weight is multiplied."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


define("(Tensor x, Tensor weight, float eps) -> Tensor", rms_norm)
