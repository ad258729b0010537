"""The operator ``cats::rotary``: a rotary position embedding of a decode step."""

import torch
from torch import Tensor

from cats.ops.definition import define

__all__ = ["rotary"]


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x [B, heads, T, D]``, ``cos`` and ``sin`` ``[B or 1, 1, T, D]``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


define("(Tensor x, Tensor cos, Tensor sin) -> Tensor", rotary)
