"""The operator ``cats::gated_mlp``: one schema, checked once, then sent to a backend.

A backend is a module beside this one with three functions:

* ``unavailable() -> str | None``: why it cannot run on this machine, or None where it is live;
* ``refuses(x, gate, up, down) -> str | None``: why it leaves this call to another one, or None;
* ``gated_mlp(...)``: the arguments of the operator, without ``backend``.
"""

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    is_in_torch_dispatch_mode,
    is_traceable_wrapper_subclass,
)

from cats.errors import BackendError, ShapeError
from cats.functional import ACTIVATIONS
from cats.ops import step  # noqa: F401 (defines operators)
from cats.ops.cuda.variant import MAX_BATCH as _CUDA_MAX_BATCH

__all__ = ["BACKENDS", "backend_for", "backends", "gated_mlp"]

# Which backends a device tries, the fastest first. `dense` takes every call; `reference` runs only
# when asked for.
_ORDER = {"cuda": ("cuda", "triton", "dense"), "cpu": ("cpu", "dense")}
# The largest batch that `auto` gives to a backend which takes more, but slower than dense GEMMs
# (docs/kernels.md).
_CROSSOVER = {"triton": 1}
BACKENDS = ("reference", "dense", "cpu", "triton", "cuda")
_ROUTERS = ("gate", "up")
_FOR_COMPILER: ContextVar[bool] = ContextVar("for_compiler", default=False)


def gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    thresholds: Tensor | float,
    activation: str,
    router: str = "gate",
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    product_thresholds: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sparse gated MLP: ``down @ (keep(act(gate @ x)) * (up @ x))``.

    Args:
        x: Inputs of ``B`` tokens, ``[B, D]``; bfloat16, float16 or float32.
        gate: ``[F, D]``, row-major, in the dtype of ``x`` like every weight and bias.
        up: ``[F, D]``, row-major.
        down: ``[D, F]``, column-major, so that the weights of one neuron are contiguous.
        thresholds: ``[F]``, float32, or one number for all. A neuron is dropped where the absolute
            output of the router is below its threshold; NaN is kept.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``.
        router: The branch that is read whole and compared: ``"gate"`` (after the activation, CATS)
            or ``"up"``. Of the other branch only the rows of kept neurons are read.
        gate_bias: ``[F]``, optional.
        up_bias: ``[F]``, optional.
        down_bias: ``[D]``, optional.
        product_thresholds: ``[F]``, float32, optional: a neuron whose product ``act(g) * u`` is
            absolutely smaller is dropped as well, and its column of ``down`` is not read.
        backend: ``"auto"``, or one of :data:`BACKENDS`.

    Returns:
        ``[B, D]`` in the dtype of ``x``; products are summed in float32.

    Raises:
        ShapeError: If a shape, dtype or layout does not fit.
        BackendError: If ``backend`` is named and cannot run this call.

    Source: arXiv:2404.08763, section on the custom kernel.
    """
    if not isinstance(thresholds, Tensor):
        thresholds = torch.full((gate.shape[0],), thresholds, device=x.device)
    elif thresholds.numel() == 1:
        thresholds = thresholds.reshape(1).expand(gate.shape[0]).contiguous()
    rest = (thresholds, activation, router, gate_bias, up_bias, down_bias, product_thresholds)
    try:
        return call(x, gate, up, down, *rest, backend)
    except RuntimeError:
        # a C++ kernel says less about what does not fit
        _check(x, gate, up, down, *rest)
        raise


def call(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *rest: Any) -> Tensor:
    """:func:`gated_mlp` for tensors that fit and all arguments by position, ``backend`` the last.

    For the hot path: what does not fit is an error too, but one that may say less.
    """
    # the C++ kernel that may stand behind the first loses the errors of a named backend
    operator = _OPERATOR if rest[-1] == "auto" else _PYTHON_OPERATOR
    if torch.is_grad_enabled() and (
        x.requires_grad or gate.requires_grad or up.requires_grad or down.requires_grad
    ):
        recorded: Any = _NoGradient
        out: Tensor = recorded.apply(operator, x, gate, up, down, *rest)
    else:
        out = operator(x, gate, up, down, *rest)
    return out


def is_unwatched(x: Tensor) -> bool:
    """Whether a kernel may be called directly: on a GPU, and nothing records, traces or compiles.

    A trip through the dispatcher and back to Python takes 25 microseconds.
    """
    return (
        x.is_cuda
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
    )


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


def is_dense_batch(x: Tensor) -> bool:
    """Whether ``backend="auto"`` gives ``[B, D]`` on a GPU to dense GEMMs whatever the weights."""
    return x.is_cuda and x.shape[0] > max(_CUDA_MAX_BATCH, _CROSSOVER["triton"])


def checked(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *rest: Any) -> Callable[..., Tensor]:
    """The function of the backend for a call, all arguments by position, ``backend`` the last.

    It takes what comes before ``backend``, also with other values in the tensors.

    Raises:
        ShapeError: If a shape, dtype or layout does not fit.
        BackendError: If a backend is named and cannot run this call.
    """
    *operands, backend = rest
    _check(x, gate, up, down, *operands)
    if backend == "auto":
        backend = backend_for(x, gate, up, down)
    else:
        _require(backend, x, gate, up, down)
    function: Callable[..., Tensor] = _module(backend).gated_mlp
    return function


def backends() -> dict[str, str]:
    """Each backend's name to ``"live"``, or to the reason why it is not."""
    return {name: why_unavailable(name) or "live" for name in BACKENDS}


def backend_for(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> str:
    """The name of the backend that ``backend="auto"`` uses for these tensors."""
    refusals: list[str] = []
    for name in _ORDER.get(x.device.type, ("dense",)):
        reason = why_unavailable(name) or _module(name).refuses(x, gate, up, down)
        if reason is None and x.shape[0] > _CROSSOVER.get(name, x.shape[0]):
            reason = f"dense GEMMs are faster for {x.shape[0]} tokens"
        if reason is None:
            sparse = _ORDER.get(x.device.type, ())[:-1]
            if name == "dense" and all(why_unavailable(n) for n in sparse):
                devices = ", ".join(_ORDER)
                none = f"there are kernels for {devices} only"
                _warn_once(x.device.type, "; ".join(refusals) or none)
            return name
        refusals.append(f"{name}: {reason}")
    raise AssertionError("the dense backend takes every call")


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"cats.ops.{name}")


@cache
def why_unavailable(name: str) -> str | None:
    """Why a backend cannot run on this machine, or None: asked once, since it takes a while."""
    reason: str | None = _module(name).unavailable()
    return reason


@cache
def _warn_once(device: str, reasons: str) -> None:
    warnings.warn(
        f"no sparse backend is live on {device}, so nothing is skipped ({reasons})", stacklevel=4
    )


def _require(backend: str, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> None:
    if backend not in BACKENDS:
        raise BackendError(f"backend must be auto or one of {', '.join(BACKENDS)}; got {backend!r}")
    if reason := why_unavailable(backend) or _module(backend).refuses(x, gate, up, down):
        raise BackendError(f"the backend {backend} cannot run this call: {reason}")


def _check(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    thresholds: Tensor,
    activation: str,
    router: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    product_thresholds: Tensor | None,
) -> None:
    f, d = gate.shape if gate.ndim == 2 else (-1, -1)
    shapes = {
        "x": (x, (x.shape[0] if x.ndim == 2 else -1, d), x.dtype),
        "gate": (gate, (f, d), x.dtype),
        "up": (up, (f, d), x.dtype),
        "down": (down, (d, f), x.dtype),
        "thresholds": (thresholds, (f,), torch.float32),
        "gate_bias": (gate_bias, (f,), x.dtype),
        "up_bias": (up_bias, (f,), x.dtype),
        "down_bias": (down_bias, (d,), x.dtype),
        "product_thresholds": (product_thresholds, (f,), torch.float32),
    }
    for name, (tensor, shape, dtype) in shapes.items():
        if tensor is None:
            continue
        if is_traceable_wrapper_subclass(tensor):
            raise ShapeError(
                f"expected {name} as an ordinary tensor, got {type(tensor).__name__}: kernels read "
                "memory, which quantised and sharded weights lay out otherwise"
            )
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != x.device:
            raise ShapeError(
                f"expected {name} {list(shape)} {dtype} on {x.device}, "
                f"got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
        if name == "down" and tensor.stride() == (1, d):
            continue
        if not (tensor.t() if name == "down" else tensor).is_contiguous():
            raise ShapeError(
                "down must be column-major: store it once as w.t().contiguous().t(); where it was "
                "replaced in a fused model, call cats.unfuse_(model), then cats.fuse_(model)"
                if name == "down"
                else f"{name} must be contiguous: call .contiguous() once, when the model is loaded"
            )
    if activation not in ACTIVATIONS:
        raise ShapeError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if router not in _ROUTERS:
        raise ShapeError(f"router must be one of {', '.join(_ROUTERS)}; got {router!r}")


def _gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    thresholds: Tensor,
    activation: str,
    router: str = "gate",
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    product_thresholds: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    rest = (thresholds, activation, router, gate_bias, up_bias, down_bias, product_thresholds)
    out: Tensor = checked(x, gate, up, down, *rest, backend)(x, gate, up, down, *rest)
    return out


_LIBRARY = torch.library.Library("cats", "DEF")
# A plain definition, not a custom_op: a third of its overhead, and a C++ kernel can register for
# one device. Such a kernel sends what it does not take to `_gated_mlp`, which nothing else calls.
for _name in ("gated_mlp", "_gated_mlp"):
    _LIBRARY.define(
        f"{_name}(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor thresholds, "
        "str activation, str router='gate', Tensor? gate_bias=None, Tensor? up_bias=None, "
        "Tensor? down_bias=None, Tensor? product_thresholds=None, str backend='auto') -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    _LIBRARY.impl(_name, _gated_mlp, "CompositeExplicitAutograd")
    # nothing to record: `call` sees to gradients
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("cats::gated_mlp", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(x: Tensor, gate: Tensor, *args: object, **kwargs: object) -> Tensor:
    # torch asks here as well where only the weights are on meta
    if gate.device != x.device:
        raise ShapeError(f"expected gate on {x.device}, got {gate.device}: are weights offloaded?")
    return torch.empty_like(x)


class _NoGradient(torch.autograd.Function):
    """A forward pass where gradients are recorded; the backward pass is an error.

    In Python alone: registered with the operator, it would cost 10 microseconds in every call.
    """

    @staticmethod
    def forward(ctx: Any, operator: Any, *args: Any) -> Tensor:
        out: Tensor = operator(*args)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise BackendError(
            "the fused operator has no gradient: call cats.unfuse_(model) before training"
        )


_OPERATOR = torch.ops.cats.gated_mlp.default
_PYTHON_OPERATOR = torch.ops.cats._gated_mlp.default
