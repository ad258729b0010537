"""How a step runs. An engine knows one model and serves any number of conversations with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from cats.decode.blocks import compile_blocks
from cats.decode.capture import (
    capture,
    graph_key,
    must_be_deterministic,
    replay,
    window_of,
    windows_of,
)
from cats.decode.cpu_kernels import use_cpu_kernels
from cats.decode.forward import (
    StepFunction,
    prefill,
    step_inputs,
    trace_unmasked,
    trace_window,
)
from cats.decode.options import Options
from cats.decode.state import State
from cats.errors import BackendError, ConfigError
from cats.ops import cuda, tracing_for_compiler

ENGINES = ("eager", "compiled", "stream")


class Engine(Protocol):
    """What the decode loop asks of an engine.

    Attributes:
        lag: Steps that may be started before the tokens of an earlier one are read.
    """

    lag: int

    @property
    def name(self) -> str:
        """As given to :class:`cats.Decoder`."""

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
        """Run the newest tokens, which make ``length`` a row, and choose the next ones."""

    def reset(self) -> None:
        """Forget what was traced or compiled: the model has changed."""


class EagerEngine:
    """Operator by operator, on any device.

    The step is traced into a flat list of operators, which leaves out the Python of the model's
    modules; on a CPU some of them become our own. A model that branches on the value of a tensor,
    or that has forward hooks, cannot be traced; it runs module by module.
    """

    name = "eager"
    lag = 0

    def __init__(self) -> None:
        self._steps: dict[Hashable, StepFunction | None] = {}

    def prefill(
        self, model: nn.Module, state: State, ids: Tensor, start: int, options: Options
    ) -> None:
        state.advance(prefill(model, state, ids, start), options)

    def prepare(self, model: nn.Module, state: State, lengths: range, options: Options) -> None:
        unmasked = state.batch, "unmasked"
        if unmasked not in self._steps:
            self._steps[unmasked] = _traced(model, lambda: trace_unmasked(model, state))
        for window in windows_of(state, lengths):
            key = state.batch, state.capacity, window
            if self._unmasked(state, min(window, lengths[-1])) is None and key not in self._steps:
                trace = partial(trace_window, model, state, window)
                self._steps[key] = _traced(model, trace)

    def step(self, model: nn.Module, state: State, length: int, options: Options) -> None:
        state.advance(self._logits(model, state, length), options)

    def reset(self) -> None:
        self._steps.clear()

    def _logits(self, model: nn.Module, state: State, length: int) -> Tensor:
        unmasked = self._unmasked(state, length)
        if unmasked is not None:
            return unmasked(*step_inputs(state, length))
        step = self._steps[state.batch, state.capacity, window_of(length, state.capacity)]
        if step is None:
            return prefill(model, state, state.tokens, length - 1)
        return step(*step_inputs(state))

    def _unmasked(self, state: State, length: int) -> StepFunction | None:
        if state.padded or length > state.unmasked_slots:
            return None
        return self._steps[state.batch, "unmasked"]


class CompiledEngine:
    """``torch.compile`` of the step; on a GPU the step and the choice of its token in one graph.

    The compiled code is shared. A CUDA graph reads and writes the buffers of one conversation,
    which keeps it.
    """

    name = "compiled"

    def __init__(self, device: torch.device) -> None:
        self.lag = 1 if device.type == "cuda" else 0
        self._steps: dict[Hashable, StepFunction] = {}

    def prefill(
        self, model: nn.Module, state: State, ids: Tensor, start: int, options: Options
    ) -> None:
        state.advance(prefill(model, state, ids, start), options)

    def prepare(self, model: nn.Module, state: State, lengths: range, options: Options) -> None:
        for window in windows_of(state, lengths):
            key = state.batch, state.capacity, window
            if key not in self._steps:
                self._steps[key] = _compiled(model, state, window)
            graph, step = graph_key(self.name, window, options), self._steps[key]
            if state.device.type == "cuda" and graph not in state.captured:
                state.captured[graph] = capture(partial(_run, step, state, options), state)

    def step(self, model: nn.Module, state: State, length: int, options: Options) -> None:
        window = window_of(length, state.capacity)
        if state.device.type == "cuda":
            replay(state, graph_key(self.name, window, options))
        else:
            _run(self._steps[state.batch, state.capacity, window], state, options)

    def reset(self) -> None:
        self._steps.clear()


class AutoEngine:
    """On a GPU: ``stream`` for what it takes, else ``compiled``, or ``eager`` where hooks must run.

    Attributes:
        refusal: Why ``stream`` does not run this model; None where it does.
    """

    lag = 1

    def __init__(self, model: nn.Module) -> None:
        self.refusal: str | None = None
        self._stream: Engine | None = None
        try:
            self._stream = _stream_engine(model)
        except BackendError as error:
            self.refusal = str(error)
        self._other: Engine = EagerEngine() if _has_hooks(model) else CompiledEngine(_device(model))

    @property
    def name(self) -> str:
        """Of the engine that runs one row without padding."""
        return self.name_for(1)

    def name_for(self, batch: int) -> str:
        """Of the engine that runs so many rows without padding."""
        return self._for(alone=batch == 1).name

    def prefill(
        self, model: nn.Module, state: State, ids: Tensor, start: int, options: Options
    ) -> None:
        self._engine(state).prefill(model, state, ids, start, options)

    def prepare(self, model: nn.Module, state: State, lengths: range, options: Options) -> None:
        self._engine(state).prepare(model, state, lengths, options)

    def step(self, model: nn.Module, state: State, length: int, options: Options) -> None:
        self._engine(state).step(model, state, length, options)

    def reset(self) -> None:
        self._other.reset()

    def _engine(self, state: State) -> Engine:
        return self._for(alone=state.batch == 1 and not state.padded)

    def _for(self, *, alone: bool) -> Engine:
        streams = alone and not must_be_deterministic()
        return self._stream if self._stream is not None and streams else self._other


def make_engine(name: str, model: nn.Module) -> Engine:
    """The engine of that name for a model.

    ``auto`` runs eagerly on a CPU; on a GPU it is :class:`AutoEngine`.

    Raises:
        ConfigError: If there is no such engine.
        BackendError: If ``stream`` was asked for and cannot run the model.
    """
    check_engine(name)
    device = _device(model)
    if name == "eager" or (name == "auto" and device.type != "cuda"):
        return EagerEngine()
    if name == "compiled":
        return CompiledEngine(device)
    return _stream_engine(model) if name == "stream" else AutoEngine(model)


def check_engine(name: str) -> None:
    """
    Raises:
        ConfigError: If there is no such engine.
    """
    if name != "auto" and name not in ENGINES:
        raise ConfigError(f"engine must be auto or one of {', '.join(ENGINES)}; got {name!r}")


def _stream_engine(model: nn.Module) -> Engine:
    reason = cuda.unavailable()
    if reason is None and _device(model).type != "cuda":
        reason = f"the model is on {_device(model)}"
    if reason is None and _has_hooks(model):
        reason = "the model has forward hooks, which it would not run"
    if reason is not None:
        raise BackendError(f"the engine stream cannot run: {reason}")
    # needs the packages whose absence `unavailable` reports
    from cats.decode.stream.engine import StreamEngine

    return StreamEngine(model)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _has_hooks(model: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _traced(model: nn.Module, trace: Callable[[], fx.GraphModule | None]) -> StepFunction | None:
    """The flat step, or None where the model has hooks, which would run once only."""
    if _has_hooks(model):
        return None
    try:
        graph = trace()
        return None if graph is None else use_cpu_kernels(graph)
    except Exception as error:
        # a tracer meets whatever a model does; the same step runs untraced, and errors there
        reason = str(error).strip().partition("\n")[0][:200]
        warnings.warn(
            f"{type(model).__name__} cannot be traced ({type(error).__name__}: {reason}), so "
            "each token runs module by module, more slowly",
            stacklevel=2,
        )
        return None


def _compiled(model: nn.Module, state: State, window: int) -> StepFunction:
    if _has_hooks(model):
        raise BackendError(
            "the engine compiled cannot run forward hooks: remove them, or use engine='eager'"
        )
    with tracing_for_compiler():
        traced = trace_window(model, state, window)
    graph = compile_blocks(traced, _compile)
    # writes the newest token to its slot, as the real step will
    graph(*step_inputs(state))
    return graph


def _run(step: StepFunction, state: State, options: Options) -> None:
    state.advance(step(*step_inputs(state)), options)


def _compile(graph: fx.GraphModule) -> Callable[..., Any]:
    # With it, inductor writes products of one row as reductions, which read weights faster than
    # the GEMMs of cuBLAS. Elsewhere than on a GPU it does nothing.
    options: dict[str, str | int | bool | Callable[..., Any]] = {
        "coordinate_descent_tuning": torch.cuda.is_available()
    }
    return torch.compile(graph, fullgraph=True, dynamic=False, options=options)
