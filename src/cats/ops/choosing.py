"""Which backend runs a call of an operator that has one module per backend.

A backend is a module of the operator's package with three functions:

* ``unavailable() -> str | None``: why it cannot run on this machine, or None where it can;
* ``refuses(arguments) -> str | None``: why it leaves this call to another backend, or None;
* one with the name of the operator: the call.
"""

import importlib
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from types import ModuleType
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from cats.errors import BackendError

__all__ = ["Backends"]


class Arguments(Protocol):
    """The arguments of a call."""

    @property
    def x(self) -> Tensor: ...

    def check(self) -> None:
        """Raise ShapeError if something does not fit."""


A = TypeVar("A", bound=Arguments)


class Backends(Generic[A]):
    """The backends of an operator.

    Attributes:
        names: All of them.
        order: What ``auto`` tries by type of device, the fastest first; ``dense`` takes every call.
    """

    def __init__(
        self,
        operator: str,
        *,
        package: str,
        names: tuple[str, ...],
        order: Mapping[str, tuple[str, ...]],
    ) -> None:
        """
        Args:
            operator: Its name, which is that of the function in each module.
            package: Holds the modules.
            names: See above.
            order: See above.
        """
        self.names, self.order = names, order
        self._operator, self._package = operator, package

    def states(self) -> dict[str, str]:
        """Each backend's name to ``"live"``, or to the reason why it is not."""
        return {name: self.why_unavailable(name) or "live" for name in self.names}

    def checked(self, arguments: A, backend: str) -> Callable[[A], Tensor]:
        """The function for a call. It may be called again with other values of tensors.

        Raises:
            ShapeError: If a shape, dtype or layout does not fit.
            BackendError: If a backend is named and cannot run this call.
        """
        arguments.check()
        if backend == "auto":
            backend = self.backend_for(arguments)
        else:
            self._require(backend, arguments)
        function: Callable[[A], Tensor] = getattr(self._module(backend), self._operator)
        return function

    def backend_for(self, arguments: A) -> str:
        """The name of the backend that ``backend="auto"`` uses for a call."""
        refusals: list[str] = []
        device = arguments.x.device.type
        order = self.order.get(device, ("dense",))
        for name in order:
            reason = self.why_refused(name, arguments)
            if reason is None:
                if name == "dense" and all(map(self.why_unavailable, order[:-1])):
                    no_kernels = f"there are kernels for {', '.join(self.order)} only"
                    _warn_once(self._operator, device, "; ".join(refusals) or no_kernels)
                return name
            refusals.append(f"{name}: {reason}")
        raise AssertionError("the dense backend takes every call")

    def why_unavailable(self, name: str) -> str | None:
        """Why a backend cannot run on this machine, or None."""
        return _why_unavailable(self._module(name))

    def why_refused(self, name: str, arguments: A) -> str | None:
        """Why a backend cannot run a call, on this machine or at all, or None."""
        reason: str | None = self.why_unavailable(name) or self._module(name).refuses(arguments)
        return reason

    def _require(self, backend: str, arguments: A) -> None:
        if backend not in self.names:
            raise BackendError(
                f"backend must be auto or one of {', '.join(self.names)}; got {backend!r}"
            )
        if reason := self.why_refused(backend, arguments):
            raise BackendError(f"the backend {backend} cannot run this call: {reason}")

    def _module(self, name: str) -> ModuleType:
        return _module(f"{self._package}.{name}")


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(name)


@cache
def _why_unavailable(module: ModuleType) -> str | None:
    # kept, since it takes a while
    reason: str | None = module.unavailable()
    return reason


@cache
def _warn_once(operator: str, device: str, reasons: str) -> None:
    warnings.warn(
        f"no kernel of {operator} is live on {device}, so torch runs it on all weights ({reasons})",
        stacklevel=5,
    )
