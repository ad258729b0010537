"""The operators of a decode step beside the MLP: ``cats::linear``, ``rms_norm`` and ``rotary``.

They are what torch computes, in one call. ``cats.ops.cpu`` has kernels for them; without one, and
where a gradient is recorded, the definitions here run.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [..., D]``, ``weight [N, D]``, ``bias [N]``: ``[..., N]``."""
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x [..., D]``, ``weight [D]``: as in Llama, rounded before the weight is multiplied."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x [B, heads, T, D]``, ``cos`` and ``sin`` ``[B or 1, 1, T, D]``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _below_autograd(name: str, definition: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator for tensors that may need a gradient."""

    def operator(*args: Any) -> Tensor:
        if torch.is_grad_enabled():
            return definition(*args)
        with torch._C._AutoDispatchBelowAutograd():
            out: Tensor = getattr(torch.ops.cats, name).default(*args)
        return out

    return operator


_LIBRARY = torch.library.Library("cats", "FRAGMENT")
for _schema, _definition in (
    ("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", linear),
    ("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", rms_norm),
    ("rotary(Tensor x, Tensor cos, Tensor sin) -> Tensor", rotary),
):
    _name = _definition.__name__
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _definition, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _below_autograd(_name, _definition), "Autograd")
    torch.library.register_fake(f"cats::{_name}", _definition, lib=_LIBRARY)
