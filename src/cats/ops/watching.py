"""Who watches a call of an operator: a trace, a compiler, a gradient, or nobody."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["is_for_compiler", "is_unwatched", "may_launch", "tracing_for_compiler"]

_FOR_COMPILER: ContextVar[bool] = ContextVar("for_compiler", default=False)


def is_unwatched(x: Tensor) -> bool:
    """Whether a kernel may be called directly: on a GPU, and nothing records, traces or compiles.

    A trip through the dispatcher and back to Python takes 25 microseconds.
    """
    return not torch.is_grad_enabled() and may_launch(x)


def may_launch(x: Tensor) -> bool:
    """Whether a kernel for weights without a gradient may be launched: on a GPU, and no trace."""
    return x.is_cuda and not torch.compiler.is_compiling() and not is_in_torch_dispatch_mode()


@contextmanager
def tracing_for_compiler() -> Iterator[None]:
    """What is traced inside, with sizes that are numbers, will be compiled."""
    token = _FOR_COMPILER.set(True)
    try:
        yield
    finally:
        _FOR_COMPILER.reset(token)


def is_for_compiler() -> bool:
    """Whether what runs now is traced inside :func:`tracing_for_compiler`."""
    # torch.compile itself may trace sizes that are symbols, and cannot look into the second
    return not torch.compiler.is_compiling() and _FOR_COMPILER.get()
