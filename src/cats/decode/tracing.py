"""Trace a step safely: one trace at a time, on a copy of the modules, compared before it is used.

``make_fx`` changes modules and operators for the whole process while it runs, and a forward pass
that stores a tensor in its module would leave a fake one there.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn

from cats.decode.marks import DEEPEST, OF_EVERY_MODULE, AttributeKey, inside, is_recorder
from cats.decode.rotary import is_adaptive
from cats.fusion import FusedMLP
from cats.model import CatsActivation

# Largest relative difference between the logits of a step and those of the model's own step: in
# more than 16 bits, and in 16 bits. A rounding can move a neuron over its threshold, which changes
# more than the rounding itself, but only for one token. So the median of several tokens decides.
# A wrong trace differs by far more.
_TOLERANCE = {
    "alike": (1e-3, 2e-2),  # the same operators
    "masked": (1e-3, 0.2),  # the same operators, but attention reads more slots under a mask
    "otherwise": (1e-3, 0.5),  # kernels that round less often
}
_COMPARED_TOKENS = 3
# Counters, frequencies and thresholds are smaller; quantised weights are larger.
_COPIED_BYTES = 2**20


class Exclusion:
    """Many threads may run models at once; a thread that traces is alone.

    Attributes:
        waiting: Number of threads that wait to trace.
    """

    def __init__(self) -> None:
        self.waiting = 0
        self._free = threading.Condition()
        self._running = 0
        self._tracer: int | None = None
        self._inside = threading.local()

    def begin_anew(self) -> None:
        """Forget the other threads, which a forked process does not have."""
        self.waiting, self._free = 0, threading.Condition()
        self._running = getattr(self._inside, "depth", 0)
        if self._tracer != threading.get_ident():
            self._tracer = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold this while a model or a step runs; inside :meth:`tracing` it does nothing."""
        depth = getattr(self._inside, "depth", 0)
        if depth == 0 and self._tracer != threading.get_ident():
            with self._free:
                # those that wait to trace go first, since other threads start steps all the time
                self._free.wait_for(lambda: self._tracer is None and not self.waiting)
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
        # a hook or processor of a running step may generate as well: its own step does not count
        runs = getattr(self._inside, "depth", 0)
        with self._free:
            self._running -= runs
            self.waiting += 1
            try:
                self._free.wait_for(lambda: self._tracer is None and not self._running)
                self._tracer = me
            finally:
                self.waiting -= 1
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


exclusion = Exclusion()
# what the other threads held, nobody would give back
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=exclusion.begin_anew)


def shadow_of(model: nn.Module, *, copied_bytes: int = 0) -> nn.Module:
    """A copy of a model's modules that shares weights and buffers with them.

    What a forward pass stores in its modules stays in the copy.

    Args:
        model: The model.
        copied_bytes: Buffers of up to this size are copied as well, so that what is written into
            them stays in the copy.

    Raises:
        Exception: What a module raises if it cannot be copied.
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
    # outside of inference mode, torch counts the writes into the copies
    with torch.inference_mode(False):
        return copy.deepcopy(model, memo)


def _tensors_in(value: object, depth: int = 0) -> Iterator[Tensor]:
    """The value if it is a tensor, or the tensors in its entries and attributes."""
    if isinstance(value, Tensor):
        yield value
    elif depth < DEEPEST and not isinstance(value, nn.Module | type | ModuleType):
        for _, item in inside(value):
            yield from _tensors_in(item, depth + 1)


def copy_to_probe(model: nn.Module) -> nn.Module:
    """A copy of the modules without hooks, so that a user's hooks do not see what a probe runs.

    It is the model itself where ``forward`` methods were replaced, which may load the weights, or
    where a module cannot be copied.
    """
    if any("forward" in vars(module) for module in model.modules()):
        return model
    try:
        shadow = shadow_of(model, copied_bytes=_COPIED_BYTES)
    except Exception:  # a foreign module may raise anything; the model itself is then probed
        return model
    for module in shadow.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for number in [number for number, hook in hooks.items() if not is_recorder(hook)]:
                del hooks[number]
    return shadow


def stored_names(changed: dict[AttributeKey, str], model: nn.Module) -> list[str]:
    """Names of the attributes that a forward pass has stored in its modules.

    A trace would compute such a value once, and not store it. Modules that we handle ourselves are
    left out: rotary embeddings, and those of cats.

    Args:
        changed: Attributes whose marks differ after the pass; see :meth:`Marks.changed`.
        model: The model of the marks.
    """
    handled = {
        index
        for index, module in enumerate(model.modules())
        if is_adaptive(module) or isinstance(module, FusedMLP | CatsActivation)
    }
    return [name for (index, _), name in changed.items() if index not in handled]


def disagreement(
    own: Callable[[], Tensor],
    step: Callable[[], Tensor],
    tokens: Tensor,
    *,
    dtype: torch.dtype,
    computed: str,
) -> str | None:
    """By how much a step differs from the model's own step, in words; None where both agree.

    Args:
        own: Runs the newest tokens through the model; returns logits ``[B, V]``.
        step: Runs them through the step that is checked; returns logits ``[B, V]``.
        tokens: The newest tokens, ``[B, 1]``, which both read. If the logits differ, other tokens
            are written there for a while, and compared as well.
        dtype: Of the model's weights.
        computed: How the step computes: ``"alike"`` (by the model's operators), ``"masked"`` (by
            the same, but attention reads more slots under a mask) or ``"otherwise"`` (by other
            kernels).
    """
    original, errors = tokens.clone(), []
    tolerance = _TOLERANCE[computed][dtype.itemsize <= 2]
    try:
        for offset in range(_COMPARED_TOKENS):
            tokens.copy_((original - offset).clamp(min=0))
            errors.append(relative_difference(step().float(), own().float()))
            if errors[0] <= tolerance:
                return None
    finally:
        tokens.copy_(original)
    median = sorted(errors)[_COMPARED_TOKENS // 2]
    return None if median <= tolerance else f"its logits differ by {median:.1%}"


def casts(device: torch.device) -> bool:
    """Whether ``torch.autocast`` is on for this type of device."""
    return torch.is_autocast_enabled(device.type)


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference divided by the norm of ``expected``.

    NaN agrees with NaN, and an infinity with the same one. Other shapes differ infinitely.
    """
    if actual.shape != expected.shape:
        return float("inf")
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    error = (actual - expected).masked_fill(same, 0).norm()
    share = float(error / expected.masked_fill(~expected.isfinite(), 0).norm().clamp(min=1e-30))
    return float("inf") if share != share else share


def first_line(error: Exception) -> str:
    """Type and first line of another library's error, for a message of our own."""
    text = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {text}"
