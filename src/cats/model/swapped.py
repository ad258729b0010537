"""Give a module's forward pass something more by replacing its class, and nothing else of it."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


class Swapped(nn.Module):
    """Base of the classes that :func:`swap_` puts before the class of a module.

    Parameters, children, hooks and adapters of the module stay where they are, and it is still an
    instance of its class. Copies and pickles name that class.

    Attributes:
        dense_class: The class that the module had.
        settings: Class attributes that :func:`swap_` was called with.
    """

    dense_class: type[nn.Module]
    settings: tuple[tuple[str, Any], ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin = type(self).__mro__[1]
        return _new, (mixin, self.dense_class, self.settings), self.__dict__


def swap_(module: nn.Module, mixin: type[Swapped], **settings: Any) -> None:
    """Put the forward pass of ``mixin`` before that of the module, in place.

    Args:
        module: A module; one that has the mixin already stays as it is.
        mixin: Its ``forward`` may call that of the module by ``super()``.
        **settings: Class attributes for it.
    """
    if not isinstance(module, mixin):
        # Any: a module's class may be set, which types do not know
        classes: tuple[Any, Any] = mixin, type(module)
        cls: Any = _class(*classes, tuple(settings.items()))
        module.__class__ = cls


def unswap_(module: nn.Module) -> None:
    """Undo :func:`swap_`; a module whose class was changed again since stays as it is."""
    if isinstance(module, Swapped) and "dense_class" in vars(type(module)):
        dense: Any = module.dense_class
        module.__class__ = dense


def _new(mixin: Any, dense: Any, settings: tuple[Any, ...]) -> Any:
    cls = _class(mixin, dense, settings)
    return cls.__new__(cls)


@functools.cache
def _class(mixin: Any, dense: Any, settings: tuple[Any, ...]) -> Any:
    # with the signature of the dense class, which others read
    @functools.wraps(dense.forward)
    def forward(self: Swapped, *args: Any, **kwargs: Any) -> Any:
        return mixin.forward(self, *args, **kwargs)

    names = {"__module__": dense.__module__, "__qualname__": dense.__qualname__}
    added = {"dense_class": dense, "settings": settings, "forward": forward}
    return type(dense.__name__, (mixin, dense), names | added | dict(settings))
