"""Trace a step without harm: one trace at a time, on a copy of the modules, checked before use.

``make_fx`` changes modules and operators for the whole process while it runs, and a forward pass
that stores a tensor in its module would leave a fake one there.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cats.decode.marks import DEEPEST, OF_EVERY_MODULE, Place, inside, is_recorder
from cats.decode.rotary import is_adaptive
from cats.fusion import FusedGatedMLP
from cats.model import CatsActivation

# Largest difference between the logits of a step and those of the model's own step, as a share of
# these: in more than 16 bits, and in 16. A neuron that a rounding moves over its threshold changes
# more than the rounding, but for one token only: the median of several tokens decides. A wrong
# trace is off by far more.
_TOLERANCE = {
    "alike": (1e-3, 2e-2),  # by the same operators
    "masked": (1e-3, 0.2),  # but attention reads more slots under a mask
    "otherwise": (1e-3, 0.5),  # by kernels that round less often
}
_TRIES = 3
# Counters, frequencies and thresholds are smaller; quantised weights are larger.
_COPIED_BYTES = 2**20


class _Exclusion:
    """Many threads may run models; one that traces is alone."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._running = 0
        self._waiting = 0
        self._tracer: int | None = None
        self._inside = threading.local()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold this while a model or a step runs; inside :meth:`tracing` it does nothing."""
        depth = getattr(self._inside, "depth", 0)
        if depth == 0 and self._tracer != threading.get_ident():
            with self._free:
                # those that wait to trace go first: steps of other threads follow without end
                self._free.wait_for(lambda: self._tracer is None and not self._waiting)
                self._running += 1
            self._inside.depth = 1
            try:
                yield
            finally:
                self._inside.depth = 0
                with self._free:
                    self._running -= 1
                    self._free.notify_all()
        else:
            yield

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Hold this while something is traced, compiled or probed."""
        me = threading.get_ident()
        if self._tracer == me:
            yield
            return
        # a hook or a processor of a running step generates as well: the step waits meanwhile
        runs = getattr(self._inside, "depth", 0)
        with self._free:
            self._running -= runs
            self._waiting += 1
            try:
                self._free.wait_for(lambda: self._tracer is None and not self._running)
                self._tracer = me
            finally:
                self._waiting -= 1
                self._free.notify_all()
        try:
            yield
        finally:
            with self._free:
                self._tracer = None
                self._free.notify_all()
                if runs:
                    self._free.wait_for(lambda: self._tracer is None)
                    self._running += runs


exclusion = _Exclusion()


def shadow_of(model: nn.Module, *, copied_bytes: int = 0) -> nn.Module:
    """A copy of a model's modules over the same weights and buffers.

    What a forward pass stores in its modules stays in the copy.

    Args:
        model: The model.
        copied_bytes: Buffers of at most so many bytes are copied, so that what is written into them
            stays in the copy as well.

    Raises:
        Exception: Whatever a module raises that cannot be copied.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            memo[id(parameter)] = parameter
        attributes = (v for k, v in vars(module).items() if k not in OF_EVERY_MODULE)
        for value in (*module._buffers.values(), *attributes):
            for tensor in _tensors_in(value):
                if tensor.nbytes > copied_bytes:
                    memo[id(tensor)] = tensor
    # what is copied counts its writes, as the original does
    with torch.inference_mode(False):
        return copy.deepcopy(model, memo)


def _tensors_in(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """The tensors in a value, in its entries and attributes."""
    if isinstance(value, Tensor):
        yield value
    elif depth < DEEPEST and not isinstance(value, nn.Module | type | ModuleType):
        for _, item in inside(value):
            yield from _tensors_in(item, depth + 1)


def copy_to_probe(model: nn.Module) -> nn.Module:
    """A copy of the modules without hooks, so that what a probe runs is not seen by a user's hooks.

    The model itself where ``forward`` methods were replaced, which may load the weights, or where a
    module cannot be copied.
    """
    if any("forward" in vars(module) for module in model.modules()):
        return model
    try:
        shadow = shadow_of(model, copied_bytes=_COPIED_BYTES)
    except Exception:  # whatever a foreign module raises: it is then probed itself
        return model
    for module in shadow.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for number in [number for number, hook in hooks.items() if not is_recorder(hook)]:
                del hooks[number]
    return shadow


def stored_names(changed: dict[Place, str], model: nn.Module) -> list[str]:
    """Names of what a forward pass has put into its modules, but for rotary embeddings.

    A trace computes such a value once and does not store it.

    Args:
        changed: Places whose marks differ after the pass.
        model: Of the marks.
    """
    ours = {
        index
        for index, module in enumerate(model.modules())
        if is_adaptive(module) or isinstance(module, FusedGatedMLP | CatsActivation)
    }
    return [name for (index, _), name in changed.items() if index not in ours]


def disagreement(
    own: Callable[[], Tensor],
    step: Callable[[], Tensor],
    tokens: Tensor,
    *,
    dtype: torch.dtype,
    computed: str,
) -> str | None:
    """By how much a step differs from the model's own, in words; None where both agree.

    Args:
        own: Runs the newest tokens through the model; gives logits ``[B, V]``.
        step: The same for the step that is in doubt.
        tokens: The newest tokens, ``[B, 1]``, which both read; others are tried as well.
        dtype: Of the model's weights.
        computed: How the step differs from the model's own: a key of :data:`_TOLERANCE`.
    """
    kept, errors = tokens.clone(), []
    tolerance = _TOLERANCE[computed][dtype.itemsize <= 2]
    try:
        for number in range(_TRIES):
            tokens.copy_((kept - number).clamp(min=0))
            errors.append(relative_difference(step().float(), own().float()))
            if errors[0] <= tolerance:
                return None
    finally:
        tokens.copy_(kept)
    median = sorted(errors)[_TRIES // 2]
    return None if median <= tolerance else f"its logits differ by {median:.1%}"


def casts(device: torch.device) -> bool:
    """Whether ``torch.autocast`` is on for a kind of device."""
    return torch.is_autocast_enabled(device.type)


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference as a share of that of the second; equal NaN and infinities agree."""
    if found.shape != wanted.shape:
        return float("inf")
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    error = (found - wanted).masked_fill(same, 0).norm()
    share = float(error / wanted.masked_fill(~wanted.isfinite(), 0).norm().clamp(min=1e-30))
    return float("inf") if share != share else share


def first_line(error: Exception) -> str:
    """Kind and first line of another library's error."""
    text = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {text}"
