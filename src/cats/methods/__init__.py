"""A method says which weights of an MLP are not read, by which scores, and how it is calibrated."""

from cats.errors import ConfigError
from cats.methods.base import CountedMethod, Method
from cats.methods.cascade import Cascade
from cats.methods.cats import Cats
from cats.methods.neuron import Neuron
from cats.methods.relu import Relu
from cats.methods.staged import StagedMethod
from cats.methods.teal import Teal
from cats.methods.two_stage import TwoStage
from cats.storage import upgrade_advice

__all__ = ["METHODS", "CountedMethod", "Method", "StagedMethod", "get_counted", "get_method"]

METHODS: dict[str, Method] = {
    method.name: method for method in (Cats(), Relu(), Neuron(), TwoStage(), Teal(), Cascade())
}


def get_method(name: str, release: object = None) -> Method:
    """
    Args:
        name: Of the method.
        release: Of this library, which wrote the name; for the message.

    Raises:
        ConfigError: If there is no such method.
    """
    if name not in METHODS:
        advice = "" if release is None else f", and {upgrade_advice(release)}"
        raise ConfigError(f"no method {name!r}; there are {', '.join(METHODS)}{advice}")
    return METHODS[name]


def get_counted(name: str) -> CountedMethod:
    """A method that is calibrated by counts.

    Raises:
        ConfigError: If there is no such method, or it is calibrated otherwise.
    """
    method = get_method(name)
    if not isinstance(method, CountedMethod):
        counted = [n for n, m in METHODS.items() if isinstance(m, CountedMethod)]
        raise ConfigError(
            f"method {name!r} has several thresholds per neuron, which counts do not give "
            f"({', '.join(counted)} have one): calibrate it with cats calibrate --bytes, or "
            "cats.calibrate(..., target_bytes=0.5)"
        )
    return method
