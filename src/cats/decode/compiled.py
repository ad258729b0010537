"""The engine ``compiled``: ``torch.compile`` of a traced step."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial

import torch
from torch import Tensor, fx, nn

from cats.decode.blocks import compile_blocks
from cats.decode.capture import capture, graph_key, replay, window_of, windows_of
from cats.decode.forward import StepFunction, prefill, step_inputs, trace_window
from cats.decode.marks import runs_own_code
from cats.decode.options import Options
from cats.decode.state import State
from cats.decode.tracing import casts, disagreement, exclusion, first_line, shadow_of
from cats.errors import BackendError
from cats.ops import tracing_for_compiler


class CompiledEngine:
    """``torch.compile`` of the step. On a GPU, one CUDA graph runs the step and chooses the token.

    Conversations share the compiled code. Each conversation holds its own graphs, which read and
    write its buffers.
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
        except Exception as error:  # a model may raise anything in a tracer
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
        # both write the newest token to its slot, where the step will write it again
        difference = difference or differs(lambda: graph(*inputs), computed="otherwise")
        if difference is not None:
            raise BackendError(
                f"the engine compiled cannot run {type(model).__name__}: {difference} from the "
                "model's own: use engine='eager'"
            )
        return graph


def _is_captured(state: State, options: Options) -> bool:
    # processors of transformers run Python at each step, which a graph does not repeat
    return state.device.type == "cuda" and options.processors is None


def _run(step: StepFunction, state: State, options: Options) -> None:
    state.advance(step(*step_inputs(state)), options)


def _compile(graph: fx.GraphModule) -> Callable[..., object]:
    # With this option, inductor computes products of one row as reductions, which read weights
    # faster than the GEMMs of cuBLAS. Without a GPU, it does nothing.
    options: dict[str, str | int | bool | Callable[..., object]] = {
        "coordinate_descent_tuning": torch.cuda.is_available()
    }
    return torch.compile(graph, fullgraph=True, dynamic=False, options=options)
