"""How a step runs. An engine knows one model and serves any number of conversations with it."""

from __future__ import annotations

import logging
import warnings
from typing import Protocol

import torch
from torch import Tensor, nn

from cats.decode.capture import must_be_deterministic
from cats.decode.compiled import CompiledEngine
from cats.decode.eager import EagerEngine
from cats.decode.marks import runs_own_code
from cats.decode.options import Options
from cats.decode.state import State, device_of
from cats.decode.tracing import casts
from cats.errors import BackendError, ConfigError
from cats.ops import cpu, cuda
from cats.weights.placement import is_dispatched

_LOG = logging.getLogger(__name__)
ENGINES = ("eager", "compiled", "stream")
# A key among the captured graphs of a conversation: it decodes with eager, since the engine failed.
_FALLBACK = "fallback"


class Engine(Protocol):
    """What the decode loop asks of an engine.

    Attributes:
        lag: How many steps may start before the tokens of an earlier one are read.
    """

    lag: int

    @property
    def name(self) -> str:
        """The name by which :class:`cats.Decoder` is asked for this engine."""

    def prefill(
        self, model: nn.Module, state: State, ids: Tensor, start: int, options: Options
    ) -> None:
        """Run prompt tokens ``[B, T]`` at slot ``start``, and choose the first new ones."""

    def prepare(self, model: nn.Module, state: State, lengths: range, options: Options) -> None:
        """Trace or compile the steps at these lengths, after the prefill, before any of them.

        Raises:
            BackendError: If the engine cannot run this model.
        """

    def step(self, model: nn.Module, state: State, length: int, options: Options) -> None:
        """Run the newest tokens, at which a row has ``length`` tokens, and choose the next ones."""

    def reset(self) -> None:
        """Forget what was traced or compiled: the model has changed."""


class AutoEngine:
    """``stream`` where it can run. Else, on a GPU, ``compiled`` where it can; else ``eager``.

    Attributes:
        refusal: Why ``stream`` does not run this model; None where it does.
        lag: As that of every engine.
    """

    def __init__(self, model: nn.Module, untraceable: str | None = None) -> None:
        self.refusal: str | None = None
        self._stream: Engine | None = None
        try:
            self._stream = _stream_engine(model, untraceable)
        except BackendError as error:
            self.refusal = str(error)
            _LOG.info("engine='auto' takes another engine: %s", error)
        device = device_of(model)
        self._is_gpu = device.type == "cuda"
        self.lag = 1 if self._is_gpu else 0
        self._eager = EagerEngine(model, untraceable)
        eager_only = runs_own_code(model) or casts(device) or untraceable is not None
        eager_only = eager_only or not self._is_gpu
        self._other: Engine = self._eager if eager_only else CompiledEngine(device)

    @property
    def name(self) -> str:
        """Name of the engine that runs one row without padding."""
        return self.name_for(1)

    def name_for(self, batch: int) -> str:
        """Name of the engine that runs ``batch`` rows without padding."""
        return self._choice(one_row=batch == 1).name

    def prefill(
        self, model: nn.Module, state: State, ids: Tensor, start: int, options: Options
    ) -> None:
        self._engine(state).prefill(model, state, ids, start, options)

    def prepare(self, model: nn.Module, state: State, lengths: range, options: Options) -> None:
        engine = self._engine(state)
        try:
            engine.prepare(model, state, lengths, options)
        except BackendError as error:
            if engine is self._eager:
                raise
            warnings.warn(
                f"{error}; engine='auto' goes on with eager, which is slower", stacklevel=2
            )
            state.captured.clear()
            state.captured[_FALLBACK] = True
            self._eager.prepare(model, state, lengths, options)

    def step(self, model: nn.Module, state: State, length: int, options: Options) -> None:
        self._engine(state).step(model, state, length, options)

    def reset(self) -> None:
        for engine in (self._stream, self._other, self._eager):
            if engine is not None:
                engine.reset()

    def _engine(self, state: State) -> Engine:
        if _FALLBACK in state.captured:
            return self._eager
        return self._choice(one_row=state.batch == 1 and not state.padded)

    def _choice(self, *, one_row: bool) -> Engine:
        # kernels of a GPU add up in any order
        forbidden = self._is_gpu and must_be_deterministic()
        if self._stream is None or not one_row or forbidden:
            return self._other
        return self._stream


def make_engine(name: str, model: nn.Module, untraceable: str | None = None) -> Engine:
    """The engine of that name for a model.

    ``auto`` is :class:`AutoEngine` on a CPU and on a GPU, and ``eager`` elsewhere.

    Args:
        name: ``"auto"`` or one of :data:`ENGINES`.
        model: A Hugging Face causal model.
        untraceable: Why steps of the model must not be traced; None where they may be.

    Raises:
        ConfigError: If there is no such engine.
        BackendError: If ``stream`` was asked for and cannot run the model.
    """
    check_engine(name)
    device = device_of(model)
    if name == "eager" or (name == "auto" and device.type not in ("cpu", "cuda")):
        return EagerEngine(model, untraceable)
    if name == "compiled":
        return CompiledEngine(device, untraceable)
    if name == "stream":
        return _stream_engine(model, untraceable)
    return AutoEngine(model, untraceable)


def check_engine(name: str) -> None:
    """
    Raises:
        ConfigError: If there is no such engine.
    """
    if name != "auto" and name not in ENGINES:
        raise ConfigError(f"engine must be auto or one of {', '.join(ENGINES)}; got {name!r}")


def stream_refusal(device: torch.device) -> str | None:
    """Why ``stream`` runs no model on a device, or None where it does."""
    if device.type != "cpu":
        return gpu_refusal(device)
    reason: str | None = cpu.unavailable()
    return None if reason is None else f"the CPU kernels are not available ({reason})"


def gpu_refusal(device: torch.device) -> str | None:
    """Why the kernels of a GPU run no model on a device, or None where they do."""
    reason: str | None = cuda.unavailable()
    if reason is None and device.type != "cuda":
        reason = f"the model is on {device}"
    return reason


def _stream_engine(model: nn.Module, untraceable: str | None) -> Engine:
    device = device_of(model)
    reason = stream_refusal(device)
    if reason is None and is_dispatched(model):
        reason = (
            "accelerate moves its inputs or weights between devices (device_map): load it on one "
            "device, or leave the engine to engine='auto'"
        )
    reason = reason or untraceable
    if reason is None and runs_own_code(model):
        reason = "the model has forward hooks or replaced forward methods, which it would not run"
    if reason is None and casts(device):
        reason = "it does not follow torch.autocast: convert the model"
    if reason is not None:
        raise BackendError(f"the engine stream cannot run: {reason}")
    if device.type == "cpu":
        from cats.decode.stream.cpu_engine import CpuStreamEngine

        return CpuStreamEngine(model)
    # needs the packages whose absence `unavailable` reports
    from cats.decode.stream.engine import StreamEngine

    return StreamEngine(model)
