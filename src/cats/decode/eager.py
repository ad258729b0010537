"""The engine ``eager``: operator by operator, on any device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

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

_UNMASKED = "unmasked"


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
                replaced = None if graph is None else use_cpu_kernels(copy_of(graph))
            except Exception as error:
                # a tracer meets whatever a model does; the step runs untraced, and errors there
                _warn_untraced(model, first_line(error))
                return
            if graph is not None:
                self._traced[key], self._steps[key] = graph, replaced
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
