"""The operator ``cats::linear``: a linear layer of a decode step."""

from torch import Tensor
from torch.nn import functional as F

from cats.ops.definition import define

__all__ = ["linear"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [..., D]``, ``weight [N, D]``, ``bias [N]``: ``[..., N]``."""
    return F.linear(x, weight, bias)


define("(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", linear)
