"""Which backend runs a call of ``cats::gated_mlp``.

A backend is a module beside this one with three functions:

* ``unavailable() -> str | None``: why it cannot run on this machine, or None where it can;
* ``refuses(arguments) -> str | None``: why it leaves this call to another backend, or None;
* ``gated_mlp(arguments) -> Tensor``: the call.

``arguments`` are always :class:`~cats.ops.mlp.arguments.GatedMLPArguments`.
"""

import importlib
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from cats.errors import BackendError
from cats.ops.mlp.arguments import GatedMLPArguments
from cats.ops.mlp.cuda.variant import MAX_BATCH as _CUDA_MAX_BATCH

__all__ = [
    "BACKENDS",
    "ORDER",
    "backend_for",
    "backends",
    "checked",
    "is_dense_batch",
    "why_refused",
    "why_unavailable",
]

BACKENDS = ("reference", "dense", "cpu", "triton", "cuda")
ORDER = {"cuda": ("cuda", "triton", "dense"), "cpu": ("cpu", "dense")}
"""The backends that ``auto`` tries on each device, the fastest first."""
# The largest batch that `auto` gives to a backend which takes more, but slower than dense GEMMs
# (docs/kernels.md).
_CROSSOVER = {"triton": 1}


def backends() -> dict[str, str]:
    """Each backend's name to ``"live"``, or to the reason why it is not."""
    return {name: why_unavailable(name) or "live" for name in BACKENDS}


def backend_for(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> str:
    """The name of the backend that ``backend="auto"`` uses for these tensors."""
    # no backend looks at thresholds or activation
    thresholds = torch.empty(len(gate), device=x.device)
    return _backend_for(GatedMLPArguments(x, gate, up, down, thresholds, "silu"))


def checked(arguments: GatedMLPArguments, backend: str) -> Callable[[GatedMLPArguments], Tensor]:
    """The function of the backend for a call. It may be called again with other values of tensors.

    Raises:
        ShapeError: If a shape, dtype or layout does not fit.
        BackendError: If a backend is named and cannot run this call.
    """
    arguments.check()
    if backend == "auto":
        backend = _backend_for(arguments)
    else:
        _require(backend, arguments)
    function: Callable[[GatedMLPArguments], Tensor] = _module(backend).gated_mlp
    return function


def is_dense_batch(x: Tensor) -> bool:
    """Whether ``backend="auto"`` gives ``[B, D]`` on a GPU to dense GEMMs whatever the weights."""
    return x.is_cuda and x.shape[0] > max(_CUDA_MAX_BATCH, _CROSSOVER["triton"])


@cache
def why_unavailable(name: str) -> str | None:
    """Why a backend cannot run on this machine, or None. Kept, since it takes a while."""
    reason: str | None = _module(name).unavailable()
    return reason


def why_refused(name: str, arguments: GatedMLPArguments) -> str | None:
    """Why a backend cannot run a call, on this machine or at all, or None."""
    reason: str | None = why_unavailable(name) or _module(name).refuses(arguments)
    return reason


def _backend_for(arguments: GatedMLPArguments) -> str:
    refusals: list[str] = []
    device, batch = arguments.x.device.type, arguments.x.shape[0]
    for name in ORDER.get(device, ("dense",)):
        reason = why_refused(name, arguments)
        if reason is None and batch > _CROSSOVER.get(name, batch):
            reason = f"dense GEMMs are faster for {batch} tokens"
        if reason is None:
            sparse = ORDER.get(device, ())[:-1]
            if name == "dense" and all(why_unavailable(n) for n in sparse):
                no_kernels = f"there are kernels for {', '.join(ORDER)} only"
                _warn_once(device, "; ".join(refusals) or no_kernels)
            return name
        refusals.append(f"{name}: {reason}")
    raise AssertionError("the dense backend takes every call")


def _require(backend: str, arguments: GatedMLPArguments) -> None:
    if backend not in BACKENDS:
        raise BackendError(f"backend must be auto or one of {', '.join(BACKENDS)}; got {backend!r}")
    if reason := why_refused(backend, arguments):
        raise BackendError(f"the backend {backend} cannot run this call: {reason}")


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"cats.ops.mlp.{name}")


@cache
def _warn_once(device: str, reasons: str) -> None:
    warnings.warn(
        f"no sparse backend is live on {device}, so nothing is skipped ({reasons})", stacklevel=4
    )
