"""Small helpers for modules: hooks, evaluation mode, and the base class of replacements."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class Replacement(nn.Module):
    """A module that runs instead of another one, over the same children."""

    @property
    @abstractmethod
    def original(self) -> nn.Module:
        """The module that it replaces."""


def has_other_forward(module: nn.Module) -> bool:
    """Whether the instance has a ``forward`` of its own, other than that of accelerate.

    A forward of accelerate only loads and moves weights.
    """
    return "forward" in vars(module) and not hasattr(module, "_hf_hook")


def is_hooked(module: nn.Module) -> bool:
    """Whether a forward pass of the module itself runs hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let two modules have the same hooks, also those that are added or removed later."""
    for name, value in vars(source).items():
        # torch reads the second name before it runs backward hooks
        if "_hooks" in name or name == "_is_full_backward_hook":
            vars(target)[name] = value


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each submodule is in the mode that it was in."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, mode in modes.items():
            submodule.training = mode
