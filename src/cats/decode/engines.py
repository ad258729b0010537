"""How a step runs. An engine knows one model and serves any number of conversations with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
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
    copy_of,
    prefill,
    step_inputs,
    trace_unmasked,
    trace_window,
)
from cats.decode.marks import runs_own_code
from cats.decode.options import Options
from cats.decode.state import State, device_of
from cats.decode.tracing import casts, disagreement, exclusion, first_line, shadow_of
from cats.errors import BackendError, ConfigError
from cats.ops import cuda, tracing_for_compiler

ENGINES = ("eager", "compiled", "stream")
_UNMASKED = "unmasked"
# Among the graphs of a conversation: that none could be captured.
_FALLBACK = "fallback"


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
    modules; on a CPU some of them become our own. A trace is used only after its logits agreed with
    those of the model. Where there is none, the step runs module by module: hooks must run, the
    model branches on the value of a tensor, or its forward pass stores something in its modules.
    """

    name = "eager"
    lag = 0

    def __init__(self, model: nn.Module, untraceable: str | None = None) -> None:
        """
        Args:
            model: The model that it will run; its settings say at which lengths it may change.
            untraceable: Why no step of the model may be traced; None where one may.
        """
        self._untraceable = untraceable
        self._critical_lengths = _critical_lengths(model)
        self._steps: dict[tuple[Any, ...], StepFunction | None] = {}
        # as traced, before kernels were replaced: what is compared with the model
        self._traced: dict[tuple[Any, ...], fx.GraphModule] = {}
        self._agreed: set[tuple[tuple[Any, ...], int]] = set()

    def prefill(
        self, model: nn.Module, state: State, ids: Tensor, start: int, options: Options
    ) -> None:
        state.advance(prefill(model, state, ids, start, state.take_extras()), options)

    def prepare(self, model: nn.Module, state: State, lengths: range, options: Options) -> None:
        unmasked = state.batch, _UNMASKED
        length = lengths[0]
        if not state.padded and length <= state.unmasked_slots:
            self._prepare(unmasked, model, state, length, partial(trace_unmasked, state=state))
        for window in windows_of(state, lengths):
            key = state.batch, state.capacity, window
            if self._key(state, min(window, lengths[-1])) == key:
                trace = partial(trace_window, state=state, window=window)
                self._prepare(key, model, state, length, trace)

    def step(self, model: nn.Module, state: State, length: int, options: Options) -> None:
        state.advance(self._logits(model, state, length), options)

    def reset(self) -> None:
        self._steps.clear()
        self._traced.clear()
        self._agreed.clear()

    def _prepare(
        self,
        key: tuple[Any, ...],
        model: nn.Module,
        state: State,
        length: int,
        trace: Callable[[nn.Module], fx.GraphModule | None],
    ) -> None:
        """Trace a step, unless that is done, and compare its next logits with the model's."""
        if key in self._steps:
            return
        with exclusion.tracing():
            if key in self._steps:
                return
            self._steps[key] = None
            if runs_own_code(model) or casts(state.device):
                return
            if self._untraceable is not None:
                _warn_untraced(model, self._untraceable)
                return
            try:
                graph = trace(shadow_of(model))
            except Exception as error:
                # a tracer meets whatever a model does; the step runs untraced, and errors there
                _warn_untraced(model, first_line(error))
                return
            if graph is not None:
                self._traced[key], self._steps[key] = graph, use_cpu_kernels(copy_of(graph))
                self._check(key, model, state, length)

    def _check(self, key: tuple[Any, ...], model: nn.Module, state: State, length: int) -> None:
        """Compare a traced step with the model's own at this length; drop it if they differ."""
        step, traced = self._steps[key], self._traced.get(key)
        if step is None or traced is None or (key, length) in self._agreed:
            return
        masked = key[-1] != _UNMASKED
        inputs = step_inputs(state, None if masked else length)

        differs = partial(
            disagreement,
            lambda: prefill(model, state, state.tokens, length - 1),
            tokens=state.tokens,
            dtype=next(model.parameters()).dtype,
        )
        difference = differs(lambda: traced(*inputs), computed="masked" if masked else "alike")
        difference = difference or differs(lambda: step(*inputs), computed="otherwise")
        if difference is not None:
            self._steps[key] = None
            _warn_untraced(model, f"at {length} tokens {difference} from the model's own")
        self._agreed.add((key, length))

    def _logits(self, model: nn.Module, state: State, length: int) -> Tensor:
        key = self._key(state, length)
        if length in self._critical_lengths and key in self._steps:
            self._check(key, model, state, length)
            key = self._key(state, length)
        step = self._steps.get(key)
        if step is None:
            return prefill(model, state, state.tokens, length - 1)
        return step(*step_inputs(state, length if key[-1] == _UNMASKED else None))

    def _key(self, state: State, length: int) -> tuple[Any, ...]:
        """Which step runs the token that makes a row so long."""
        unmasked = state.batch, _UNMASKED
        if not state.padded and length <= state.unmasked_slots and self._steps.get(unmasked):
            return unmasked
        return state.batch, state.capacity, window_of(length, state.capacity)


class CompiledEngine:
    """``torch.compile`` of the step; on a GPU the step and the choice of its token in one graph.

    The compiled code is shared. A CUDA graph reads and writes the buffers of one conversation,
    which keeps it.
    """

    name = "compiled"

    def __init__(self, device: torch.device, untraceable: str | None = None) -> None:
        self.lag = 1 if device.type == "cuda" else 0
        self._untraceable = untraceable
        self._steps: dict[Hashable, StepFunction] = {}

    def prefill(
        self, model: nn.Module, state: State, ids: Tensor, start: int, options: Options
    ) -> None:
        state.advance(prefill(model, state, ids, start, state.take_extras()), options)

    def prepare(self, model: nn.Module, state: State, lengths: range, options: Options) -> None:
        for window in windows_of(state, lengths):
            key = state.batch, state.capacity, window
            graph = graph_key(self.name, window, options)
            captures = _is_captured(state, options) and graph not in state.captured
            if key in self._steps and not captures:
                continue
            with exclusion.tracing():
                if key not in self._steps:
                    self._steps[key] = self._compiled(model, state, window, lengths[0])
                if captures:
                    step = partial(_run, self._steps[key], state, options)
                    state.captured[graph] = capture(step, state)

    def step(self, model: nn.Module, state: State, length: int, options: Options) -> None:
        window = window_of(length, state.capacity)
        if _is_captured(state, options):
            replay(state, graph_key(self.name, window, options))
        else:
            _run(self._steps[state.batch, state.capacity, window], state, options)

    def reset(self) -> None:
        self._steps.clear()

    def _compiled(self, model: nn.Module, state: State, window: int, length: int) -> StepFunction:
        reason = self._untraceable
        if runs_own_code(model):
            reason = (
                "it cannot run forward hooks and replaced forward methods: remove them, or use "
                "engine='eager'"
            )
        elif casts(state.device):
            reason = "it does not follow torch.autocast: convert the model, or use engine='eager'"
        if reason is not None:
            raise BackendError(f"the engine compiled cannot run: {reason}")
        try:
            with tracing_for_compiler():
                traced = trace_window(shadow_of(model), state, window)
        except Exception as error:  # a tracer meets whatever a model does
            raise BackendError(
                f"the engine compiled cannot trace {type(model).__name__} "
                f"({first_line(error)}): use engine='eager'"
            ) from error
        inputs = step_inputs(state)
        differs = partial(
            disagreement,
            lambda: prefill(model, state, state.tokens, length - 1),
            tokens=state.tokens,
            dtype=next(model.parameters()).dtype,
        )
        difference = differs(lambda: traced(*inputs), computed="masked")
        graph: StepFunction = compile_blocks(traced, _compile)
        # writes the newest token to its slot, as the real step will
        difference = difference or differs(lambda: graph(*inputs), computed="otherwise")
        if difference is not None:
            raise BackendError(
                f"the engine compiled cannot run {type(model).__name__}: {difference} from the "
                "model's own: use engine='eager'"
            )
        return graph


class AutoEngine:
    """On a GPU: ``stream`` for what it takes, else ``compiled``, else ``eager``.

    Attributes:
        refusal: Why ``stream`` does not run this model; None where it does.
    """

    lag = 1

    def __init__(self, model: nn.Module, untraceable: str | None = None) -> None:
        self.refusal: str | None = None
        self._stream: Engine | None = None
        try:
            self._stream = _stream_engine(model, untraceable)
        except BackendError as error:
            self.refusal = str(error)
        device = device_of(model)
        self._eager = EagerEngine(model, untraceable)
        eager_only = runs_own_code(model) or casts(device) or untraceable is not None
        self._other: Engine = self._eager if eager_only else CompiledEngine(device)

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
        engine = self._engine(state)
        try:
            engine.prepare(model, state, lengths, options)
        except BackendError as error:
            if engine is self._eager:
                raise
            warnings.warn(f"{error}; engine='auto' goes on with eager, more slowly", stacklevel=2)
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
        return self._for(alone=state.batch == 1 and not state.padded)

    def _for(self, *, alone: bool) -> Engine:
        streams = alone and not must_be_deterministic()
        return self._stream if self._stream is not None and streams else self._other


def make_engine(name: str, model: nn.Module, stored: Sequence[str] = ()) -> Engine:
    """The engine of that name for a model.

    ``auto`` runs eagerly on a CPU; on a GPU it is :class:`AutoEngine`.

    Args:
        name: ``"auto"`` or one of :data:`ENGINES`.
        model: A Hugging Face causal model.
        stored: Names of what a forward pass stores in the model's modules.

    Raises:
        ConfigError: If there is no such engine.
        BackendError: If ``stream`` was asked for and cannot run the model.
    """
    check_engine(name)
    device = device_of(model)
    untraceable = f"its forward pass stores {stored[0]}" if stored else None
    if name == "eager" or (name == "auto" and device.type != "cuda"):
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
    reason: str | None = cuda.unavailable()
    if reason is None and device.type != "cuda":
        reason = f"the model is on {device}"
    return reason


def _stream_engine(model: nn.Module, untraceable: str | None) -> Engine:
    device = device_of(model)
    reason = stream_refusal(device) or untraceable
    if reason is None and runs_own_code(model):
        reason = "the model has forward hooks or replaced forward methods, which it would not run"
    if reason is None and casts(device):
        reason = "it does not follow torch.autocast: convert the model"
    if reason is not None:
        raise BackendError(f"the engine stream cannot run: {reason}")
    # needs the packages whose absence `unavailable` reports
    from cats.decode.stream.engine import StreamEngine

    return StreamEngine(model)


def _critical_lengths(model: Any) -> frozenset[int]:
    """Lengths at which a model may begin to compute something else.

    Those just above a number of its configuration, such as an original context, and above powers
    of 2, by which tables grow.
    """
    config = model.config.get_text_config(decoder=True)
    found = [*vars(config).values(), *(getattr(config, "rope_parameters", None) or {}).values()]
    numbers = {value for value in found if type(value) is int and value > 1}
    return frozenset(n + 1 for n in numbers | {2**i for i in range(5, 24)})


def _warn_untraced(model: nn.Module, reason: str) -> None:
    warnings.warn(
        f"{type(model).__name__} cannot be traced ({reason}), so each token runs module by module, "
        "more slowly",
        stacklevel=2,
    )


def _is_captured(state: State, options: Options) -> bool:
    # processors of transformers are no operators that a graph could repeat
    return state.device.type == "cuda" and options.processors is None


def _run(step: StepFunction, state: State, options: Options) -> None:
    state.advance(step(*step_inputs(state)), options)


def _compile(graph: fx.GraphModule) -> Callable[..., Any]:
    # With it, inductor writes products of one row as reductions, which read weights faster than
    # the GEMMs of cuBLAS. Elsewhere than on a GPU it does nothing.
    options: dict[str, str | int | bool | Callable[..., Any]] = {
        "coordinate_descent_tuning": torch.cuda.is_available()
    }
    return torch.compile(graph, fullgraph=True, dynamic=False, options=options)
