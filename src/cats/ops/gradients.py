"""Calls of operators that have no gradient."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from cats.errors import BackendError

__all__ = ["without_gradient"]


def without_gradient(operator: Callable[..., Tensor], *arguments: object) -> Tensor:
    """A call while gradients are recorded: it runs, and a backward pass through it is an error.

    Not registered with the operator, where it would cost 10 microseconds in every call.
    """
    apply: Any = _NoGradient.apply
    out: Tensor = apply(operator, *arguments)
    return out


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, operator: Callable[..., Tensor], *args: object) -> Tensor:
        return operator(*args)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> NoReturn:
        raise BackendError(
            "the fused operator has no gradient: call cats.unfuse_(model) before training"
        )
