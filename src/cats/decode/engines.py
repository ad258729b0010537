"""How a step runs. An engine knows one model and serves any number of conversations with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from cats.decode.blocks import compile_blocks
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

ENGINES = ("eager", "compiled")


# Slots that a masked step reads: the smallest of these, doubled as often as needed.
_SMALLEST_WINDOW = 256


class Engine(Protocol):
    """What the decode loop asks of an engine.

    Attributes:
        name: As given to :class:`cats.Decoder`.
        lag: Steps that may be started before the tokens of an earlier one are read.
    """

    name: str
    lag: int

    def prefill(
        self, model: nn.Module, state: State, ids: Tensor, start: int, options: Options
    ) -> Tensor:
        """Run prompt tokens ``[B, T]`` at slot ``start``; returns the first new tokens, ``[B]``."""

    def prepare(self, model: nn.Module, state: State, lengths: range, options: Options) -> None:
        """Trace or compile the steps at these lengths, after the prefill, before any of them.

        Raises:
            BackendError: If the engine cannot run this model.
        """

    def step(self, model: nn.Module, state: State, length: int, options: Options) -> Tensor:
        """Run the newest tokens, which make ``length`` a row; returns the next ones, ``[B]``."""

    def reset(self) -> None:
        """Forget what was traced or compiled: the model has changed."""


class EagerEngine:
    """Operator by operator, on any device.

    The step is traced into a flat list of operators, which leaves out the Python of the model's
    modules. A model that branches on the value of a tensor, or that has forward hooks, cannot be
    traced; it runs module by module.
    """

    name = "eager"
    lag = 0

    def __init__(self) -> None:
        self._steps: dict[Hashable, StepFunction | None] = {}

    def prefill(
        self, model: nn.Module, state: State, ids: Tensor, start: int, options: Options
    ) -> Tensor:
        return state.advance(prefill(model, state, ids, start), options)

    def prepare(self, model: nn.Module, state: State, lengths: range, options: Options) -> None:
        unmasked = state.batch, "unmasked"
        if unmasked not in self._steps:
            self._steps[unmasked] = _traced(model, lambda: trace_unmasked(model, state))
        for window in _windows(state, lengths):
            key = state.batch, state.capacity, window
            if self._unmasked(state, min(window, lengths[-1])) is None and key not in self._steps:
                trace = partial(trace_window, model, state, window)
                self._steps[key] = _traced(model, trace)

    def step(self, model: nn.Module, state: State, length: int, options: Options) -> Tensor:
        unmasked = self._unmasked(state, length)
        if unmasked is not None:
            return state.advance(unmasked(*step_inputs(state, length)), options)
        step = self._steps[state.batch, state.capacity, window_of(length, state.capacity)]
        if step is None:
            return state.advance(prefill(model, state, state.tokens, length - 1), options)
        return state.advance(step(*step_inputs(state)), options)

    def reset(self) -> None:
        self._steps.clear()

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
    ) -> Tensor:
        return state.advance(prefill(model, state, ids, start), options)

    def prepare(self, model: nn.Module, state: State, lengths: range, options: Options) -> None:
        for window in _windows(state, lengths):
            key, graph = (state.batch, state.capacity, window), _graph_key(window, options)
            try:
                if key not in self._steps:
                    self._steps[key] = _compiled(model, state, window)
                if state.device.type == "cuda" and graph not in state.captured:
                    state.captured[graph] = _capture(self._steps[key], state, options)
            except torch.cuda.OutOfMemoryError as error:
                state.captured.clear()
                raise BackendError(
                    f"out of memory while a step over {window} slots was prepared: use a shorter "
                    "context, a smaller batch, or engine='eager'"
                ) from error

    def step(self, model: nn.Module, state: State, length: int, options: Options) -> Tensor:
        window = window_of(length, state.capacity)
        if state.device.type == "cuda":
            graph, chosen = state.captured[_graph_key(window, options)]
            graph.replay()
            out: Tensor = chosen
            return out
        step = self._steps[state.batch, state.capacity, window]
        return state.advance(step(*step_inputs(state)), options)

    def reset(self) -> None:
        self._steps.clear()


def window_of(length: int, capacity: int | None = None) -> int:
    """Slots that a masked step reads for ``length`` tokens a row."""
    window = _SMALLEST_WINDOW
    while window < length:
        window *= 2
    return window if capacity is None else min(window, capacity)


def make_engine(name: str, device: torch.device) -> Engine:
    """The engine of that name; ``auto`` compiles on a GPU and runs eagerly elsewhere.

    Raises:
        ConfigError: If there is no such engine.
    """
    if name == "auto":
        name = "compiled" if device.type == "cuda" else "eager"
    if name == "eager":
        return EagerEngine()
    if name == "compiled":
        return CompiledEngine(device)
    raise ConfigError(f"engine must be auto or one of {', '.join(ENGINES)}; got {name!r}")


def _has_hooks(model: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _windows(state: State, lengths: range) -> list[int]:
    return sorted({window_of(length, state.capacity) for length in lengths})


def _traced(model: nn.Module, trace: Callable[[], StepFunction | None]) -> StepFunction | None:
    """The flat step, or None where the model has hooks, which would run once only."""
    if _has_hooks(model):
        return None
    try:
        return trace()
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
    graph = compile_blocks(trace_window(model, state, window), _compile)
    # writes the newest token to its slot, as the real step will
    graph(*step_inputs(state))
    return graph


def _compile(graph: fx.GraphModule) -> Callable[..., Any]:
    return torch.compile(graph, fullgraph=True, dynamic=False)


def _graph_key(window: int, options: Options) -> tuple[int, Options]:
    """What a captured step depends on: not the seed, nor what the host looks at."""
    return window, replace(options, seed=None, max_new_tokens=1, stop_strings=())


def _capture(
    step: StepFunction, state: State, options: Options
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A CUDA graph of a step and the choice of its token, and the buffer of the chosen, ``[B]``."""
    before = [t.clone() for t in state.moving()]
    draws = state.generator.get_state()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # allocates what libraries keep, which a capture must not do
        state.advance(step(*step_inputs(state)), options)
    torch.cuda.current_stream().wait_stream(stream)
    for tensor, old in zip(state.moving(), before, strict=True):
        tensor.copy_(old)
    state.generator.set_state(draws)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(state.generator)
    with torch.cuda.graph(graph):
        chosen = state.advance(step(*step_inputs(state)), options)
    return graph, chosen
