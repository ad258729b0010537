"""Numbers and ids in every form that users have them: of Python, numpy or torch."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from torch import Tensor

from cats.errors import ConfigError


def integer(name: str, value: Any) -> int:
    """
    Raises:
        ConfigError: If it is no whole number; a bool is none.
    """
    value = _item(value)
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise ConfigError(f"expected a whole number as {name}, got {value!r}")


def number(name: str, value: Any) -> float:
    """
    Raises:
        ConfigError: If it is no number; a bool is none.
    """
    value = _item(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise ConfigError(f"expected a number as {name}, got {value!r}")


def flag(name: str, value: Any) -> bool:
    """
    Raises:
        ConfigError: If it is neither true nor false.
    """
    value = _item(value)
    if value is None or isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise ConfigError(f"expected True or False as {name}, got {value!r}")


def integers(name: str, value: Any) -> tuple[int, ...]:
    """One whole number or several of them; none for None.

    Raises:
        ConfigError: If there is something else among them.
    """
    if value is None:
        return ()
    if isinstance(value, Tensor | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple | set):
        return tuple(integer(name, one) for one in value)
    return (integer(name, value),)


def plain(value: Any) -> Any:
    """The same in numbers, lists, tuples and dictionaries of Python."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    if isinstance(value, dict):
        return {plain(key): plain(one) for key, one in value.items()}
    return value


def _item(value: Any) -> Any:
    """A number of Python, where it is one number of numpy or torch."""
    one = isinstance(value, np.generic) or (
        isinstance(value, Tensor | np.ndarray) and not value.ndim
    )
    return value.item() if one else value
