"""Define an operator of ``torch.ops.cats`` by what it computes in PyTorch.

``cats.ops.cpu`` has kernels for them. The definition runs where there is no kernel, and where a
gradient is recorded.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["define"]

_LIBRARY = torch.library.Library("cats", "FRAGMENT")


def define(schema: str, definition: Callable[..., Tensor]) -> None:
    """Define ``cats::<name of the function>``.

    Args:
        schema: Arguments and result as torch writes them, such as ``(Tensor x) -> Tensor``.
        definition: What it computes.
    """
    name = definition.__name__
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, definition, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, _below_autograd(name, definition), "Autograd")
    torch.library.register_fake(f"cats::{name}", definition, lib=_LIBRARY)


def _below_autograd(name: str, definition: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator for tensors that may need a gradient."""

    def operator(*args: object) -> Tensor:
        if torch.is_grad_enabled():
            return definition(*args)
        with torch._C._AutoDispatchBelowAutograd():
            out: Tensor = getattr(torch.ops.cats, name).default(*args)
        return out

    return operator
