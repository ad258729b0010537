"""A method says what calibration counts, by which score, and how an MLP becomes sparse."""

from cats.errors import ConfigError
from cats.methods.base import Method
from cats.methods.cats import Cats
from cats.methods.relu import Relu

__all__ = ["METHODS", "Method", "get_method"]

METHODS: dict[str, Method] = {method.name: method for method in (Cats(), Relu())}


def get_method(name: str) -> Method:
    """
    Raises:
        ConfigError: If there is no such method.
    """
    if name not in METHODS:
        raise ConfigError(f"no method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]
