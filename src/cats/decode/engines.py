"""How a step runs. An engine knows one model and serves any number of conversations with it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from cats.decode.forward import StepFunction, flatten, prefill, step_function, step_inputs
from cats.decode.options import Options
from cats.decode.state import State
from cats.errors import BackendError, ConfigError

ENGINES = ("eager", "compiled")


class Engine(Protocol):
    """What the decode loop asks of an engine.

    Attributes:
        name: As given to :class:`cats.Decoder`.
        lag: Steps that may be started before the tokens of an earlier one are read.
    """

    name: str
    lag: int

    def prepare(self, model: nn.Module, state: State, windows: list[int], options: Options) -> None:
        """Trace or compile the steps of these windows, before the first token."""

    def prefill(
        self, model: nn.Module, state: State, ids: Tensor, start: int, options: Options
    ) -> Tensor:
        """Run prompt tokens ``[B, T]`` at slot ``start``; returns the first new tokens, ``[B]``."""

    def step(self, model: nn.Module, state: State, window: int, options: Options) -> Tensor:
        """Run the newest tokens; returns the next ones, ``[B]``."""

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
        self._steps: dict[tuple[int, int, int], StepFunction | None] = {}

    def prepare(self, model: nn.Module, state: State, windows: list[int], options: Options) -> None:
        for window in windows:
            key = self._key(state, window)
            if key not in self._steps:
                self._steps[key] = _traced(model, state, window)

    def prefill(
        self, model: nn.Module, state: State, ids: Tensor, start: int, options: Options
    ) -> Tensor:
        return state.advance(prefill(model, state, ids, start), options)

    def step(self, model: nn.Module, state: State, window: int, options: Options) -> Tensor:
        step = self._steps[self._key(state, window)]
        if step is None:
            logits = prefill(model, state, state.tokens, int(state.slot))
        else:
            logits = step(*step_inputs(state))
        return state.advance(logits, options)

    def reset(self) -> None:
        self._steps.clear()

    def _key(self, state: State, window: int) -> tuple[int, int, int]:
        return state.batch, state.capacity, window


class CompiledEngine:
    """``torch.compile`` of the step; on a GPU the step and the choice of its token in one graph.

    The compiled code is shared. A CUDA graph reads and writes the buffers of one conversation,
    which keeps it.
    """

    name = "compiled"

    def __init__(self, device: torch.device) -> None:
        self.lag = 1 if device.type == "cuda" else 0
        self._steps: dict[tuple[int, int, int], StepFunction] = {}

    def prepare(self, model: nn.Module, state: State, windows: list[int], options: Options) -> None:
        for window in windows:
            key = (state.batch, state.capacity, window)
            try:
                if key not in self._steps:
                    self._steps[key] = _compiled(model, state, window)
                graph = _graph_key(window, options)
                if state.device.type == "cuda" and graph not in state.captured:
                    state.captured[graph] = _capture(self._steps[key], state, options)
            except torch.cuda.OutOfMemoryError as error:
                state.captured.clear()
                raise BackendError(
                    f"out of memory while a step over {window} slots was prepared: use a shorter "
                    "context, a smaller batch, or engine='eager'"
                ) from error

    def prefill(
        self, model: nn.Module, state: State, ids: Tensor, start: int, options: Options
    ) -> Tensor:
        return state.advance(prefill(model, state, ids, start), options)

    def step(self, model: nn.Module, state: State, window: int, options: Options) -> Tensor:
        if state.device.type == "cuda":
            graph, chosen = state.captured[_graph_key(window, options)]
            graph.replay()
            out: Tensor = chosen
            return out
        step = self._steps[state.batch, state.capacity, window]
        return state.advance(step(*step_inputs(state)), options)

    def reset(self) -> None:
        self._steps.clear()


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


def _traced(model: nn.Module, state: State, window: int) -> StepFunction | None:
    """The flat step, or None where the model has hooks, which would run once only."""
    if _has_hooks(model):
        return None
    try:
        return flatten(step_function(model, state, window), state)
    except Exception as error:
        # a tracer meets whatever a model does; the same step runs untraced, and errors there
        reason = str(error).strip().splitlines()[0][:200]
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
    graph = flatten(step_function(model, state, window), state)
    step: StepFunction = torch.compile(graph, fullgraph=True, dynamic=False)
    # writes the newest token to its slot, as the real step will
    step(*step_inputs(state))
    return step


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
