"""Numbers and ids as users write them: of Python, numpy or torch."""

from __future__ import annotations

import operator
from typing import Any, SupportsIndex

import numpy as np
from torch import Tensor

from cats.errors import ConfigError


def integer(name: str, value: object) -> int:
    """The value as an ``int``.

    Raises:
        ConfigError: If it is no whole number; a bool is none.
    """
    value = _item(value)
    if isinstance(value, SupportsIndex) and not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:  # an array of several numbers
            pass
    raise ConfigError(f"expected a whole number as {name}, got {value!r}")


def number(name: str, value: object) -> float:
    """The value as a ``float``.

    Raises:
        ConfigError: If it is no number; a bool is none.
    """
    value = _item(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise ConfigError(f"expected a number as {name}, got {value!r}")


def flag(name: str, value: object) -> bool:
    """The value as a ``bool``; None is False.

    Raises:
        ConfigError: If it is neither true nor false.
    """
    value = _item(value)
    if value is None or isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise ConfigError(f"expected True or False as {name}, got {value!r}")


def integers(name: str, value: object) -> tuple[int, ...]:
    """One whole number or several, as a tuple; None gives an empty one.

    Raises:
        ConfigError: If something else is among them.
    """
    if value is None:
        return ()
    if isinstance(value, Tensor | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple | set):
        return tuple(integer(name, item) for item in value)
    return (integer(name, value),)


def plain(value: Any) -> Any:
    """The value with Python's numbers and lists instead of those of numpy and torch."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    return value


def _item(value: object) -> object:
    """Python's number instead of one number of numpy or torch; anything else unchanged."""
    if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0:
        return value.item()
    return value
