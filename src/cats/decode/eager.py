"""The engine ``eager``: operator by operator, on any device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import cast

from torch import Tensor, fx, nn

from cats.decode.capture import window_of, windows_of
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
from cats.decode.state import State
from cats.decode.tracing import casts, disagreement, exclusion, first_line, shadow_of
from cats.protocols import CausalModel

_UNMASKED = "unmasked"
# The batch with _UNMASKED; or batch, capacity and window of a masked step.
_StepKey = tuple[int | str, ...]


class EagerEngine:
    """Operator by operator, on any device.

    A step is traced into a flat list of operators, without the Python of the model's modules. On a
    CPU, our own operators replace some of them. A trace is used only after its logits agreed with
    the model's. A step runs module by module where it has hooks, where the model branches on the
    value of a tensor, and where a forward pass stores something in its modules.
    """

    name = "eager"
    lag = 0

    def __init__(self, model: nn.Module, untraceable: str | None = None) -> None:
        """
        Args:
            model: The model that it will run. Its settings say at which lengths it may change.
            untraceable: Why steps of the model must not be traced; None where they may be.
        """
        self._untraceable = untraceable
        self._critical_lengths = _critical_lengths(model)
        self._steps: dict[_StepKey, StepFunction | None] = {}
        # without our own operators: these are compared with the model
        self._traced: dict[_StepKey, fx.GraphModule] = {}
        self._agreed: set[tuple[_StepKey, int]] = set()

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
        key: _StepKey,
        model: nn.Module,
        state: State,
        length: int,
        trace: Callable[[nn.Module], fx.GraphModule | None],
    ) -> None:
        """Trace a step once, and compare its next logits with the model's."""
        if key in self._steps:
            return
        with exclusion.tracing():
            if key in self._steps:
                return
            self._steps[key] = None
            if runs_own_code(model) or casts(state.device):
                return
            if self._untraceable is not None:
                warn_untraced(model, self._untraceable)
                return
            try:
                graph = trace(shadow_of(model))
                replaced = None if graph is None else use_cpu_kernels(copy_of(graph))
            except Exception as error:
                # a model may raise anything in a tracer; its own errors come again without one
                warn_untraced(model, first_line(error))
                return
            if graph is not None:
                self._traced[key], self._steps[key] = graph, replaced
                self._check(key, model, state, length)

    def _check(self, key: _StepKey, model: nn.Module, state: State, length: int) -> None:
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
            warn_untraced(model, f"at {length} tokens {difference} from the model's own")
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

    def _key(self, state: State, length: int) -> _StepKey:
        """The step after which rows have this length."""
        unmasked = state.batch, _UNMASKED
        if not state.padded and length <= state.unmasked_slots and self._steps.get(unmasked):
            return unmasked
        return state.batch, state.capacity, window_of(length, state.capacity)


def _critical_lengths(model: nn.Module) -> frozenset[int]:
    """Lengths at which a model may begin to compute something else.

    These are 1 more than a number of its configuration, such as the original context, and 1 more
    than a power of 2, since tables grow to these.
    """
    config = cast(CausalModel, model).config.get_text_config(decoder=True)
    rope_parameters = getattr(config, "rope_parameters", None) or {}
    settings = [*vars(config).values(), *rope_parameters.values()]
    numbers = {value for value in settings if type(value) is int and value > 1}
    return frozenset(n + 1 for n in numbers | {2**i for i in range(5, 24)})


def warn_untraced(model: nn.Module, reason: str) -> None:
    """Say that steps of a model run module by module, and why."""
    warnings.warn(
        f"{type(model).__name__} cannot be traced ({reason}), so each token runs module by module, "
        "more slowly",
        stacklevel=2,
    )
