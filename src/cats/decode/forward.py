"""Run a Hugging Face model with a cache: module by module, or as a flat list of operators."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache

from cats.decode.state import State
from cats.errors import UnsupportedModelError
from cats.protocols import CausalModel

# Tokens, positions, slot and valid of a state, then keys and values of each layer in turn.
StepInputs = tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]
# Takes StepInputs; gives logits [B, V].
StepFunction = Callable[[Tensor, Tensor, Tensor, Tensor, list[Tensor]], Tensor]

# Slots that are read while a step for any number of slots is traced. No model has a dimension of
# this size, so that it is recognised in the trace.
TRACED_SLOTS = 59


def prefill(
    model: nn.Module,
    state: State,
    ids: Tensor,
    start: int,
    extras: Mapping[str, Any] | None = None,
) -> Tensor:
    """Run tokens module by module, and return the logits of the last one, ``[B, V]``.

    Attention reads the slots up to the last new one. It has no mask where there is no padding.

    Args:
        model: A Hugging Face causal model.
        state: The conversation.
        ids: Token ids ``[B, T]``.
        start: The slot of their first column.
        extras: What the model takes with a prompt beside ids and mask, such as ``pixel_values``.

    Raises:
        UnsupportedModelError: If the model did not write keys and values of these tokens once.
    """
    end = start + ids.shape[1]
    cache = state.cache
    cache.start, cache.newest, cache.window = start, None, end
    valid = state.valid[:, :end]
    positions = (valid.cumsum(1) - 1).clamp(min=0)[:, start:]
    if state.padded and "attention_mask" not in arguments_of(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} takes no attention_mask, so that padding cannot be hidden: "
            "give prompts of one length"
        )
    with cache.expecting(ids.shape[1], type(model).__name__):
        logits = last_logits(model, ids, positions, valid, cache, extras or {})
    return logits.to(state.device)


def step_inputs(state: State, slots: int | None = None) -> StepInputs:
    """What a traced step reads and writes: keys and values of all slots, or of the first ``slots``.

    All rows of a traced step have the slot of the first row, see below.
    """
    stored = state.cache.buffers()
    if slots is not None:
        stored = [t[:, :, :slots] for t in stored]
    # transformers makes its masks from one number of earlier tokens: the engines eager and compiled
    # step all rows together, and this is the only place that says so
    return state.tokens, state.positions, state.slots[:1], state.valid, stored


def trace_window(model: nn.Module, state: State, window: int) -> fx.GraphModule:
    """A step as a flat list of operators, without the Python of the model's modules.

    Attention reads the first ``window`` slots under a mask. So the step serves every slot among
    them, and rows with padding. Weights and buffers are those of the model, so that later writes
    into them are seen.

    Raises:
        Exception: Whatever stops the tracing, such as a branch on the value of a tensor.
    """
    cache = state.cache

    def step(
        tokens: Tensor, positions: Tensor, slot: Tensor, valid: Tensor, stored: list[Tensor]
    ) -> Tensor:
        cache.start, cache.newest, cache.window = slot, slot, window
        with cache.working_on(stored):
            return last_logits(model, tokens, positions, valid[:, :window], cache)

    return _trace(step, step_inputs(state))


def trace_unmasked(model: nn.Module, state: State) -> fx.GraphModule | None:
    """A step without a mask, for rows without padding; its inputs are the slots that it reads.

    It serves fewer slots than a sliding window has. None where the operators depend on the length.

    Raises:
        Exception: As :func:`trace_window`.
    """
    if state.capacity < TRACED_SLOTS or state.unmasked_slots < TRACED_SLOTS:
        return None
    cache = state.cache

    def step(
        tokens: Tensor, positions: Tensor, slot: Tensor, valid: Tensor, stored: list[Tensor]
    ) -> Tensor:
        cache.start, cache.newest, cache.window = TRACED_SLOTS - 1, slot, TRACED_SLOTS
        with cache.working_on(stored):
            return last_logits(model, tokens, positions, None, cache)

    return trace_for_any_length(step, step_inputs(state, TRACED_SLOTS))


def trace_for_any_length(
    step: Callable[..., Tensor], inputs: tuple[object, ...]
) -> fx.GraphModule | None:
    """A step as a flat list of operators, or None where these depend on the traced length.

    Args:
        step: Gives logits.
        inputs: Of ``step``, with :data:`TRACED_SLOTS` slots.

    Raises:
        Exception: As :func:`trace_window`.
    """
    graph = _trace(step, inputs)
    return None if _mentions(graph, {TRACED_SLOTS - 1, TRACED_SLOTS}) else graph


def _trace(step: Callable[..., Tensor], inputs: tuple[object, ...]) -> fx.GraphModule:
    # the logger prints a traceback for what cannot be traced; our warning gives the reason
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level, log.level = log.level, logging.CRITICAL
    try:
        traced = make_fx(step, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)
        graph = traced(*inputs)
    finally:
        log.level = level
    _drop_copies(graph)
    return graph


def copy_of(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of the list of operators, over the same weights."""
    nodes = fx.Graph()
    nodes.output(nodes.graph_copy(graph.graph, {}))
    nodes.set_codegen(graph.graph._codegen)  # it flattens the list of keys and values
    return fx.GraphModule(graph, nodes)


def _mentions(graph: fx.GraphModule, numbers: set[int]) -> bool:
    return any(
        type(argument) is int and argument in numbers
        for node in graph.graph.nodes
        for argument in pytree.tree_leaves((node.args, node.kwargs))
    )


def last_logits(
    model: nn.Module,
    ids: Tensor,
    positions: Tensor,
    mask: Tensor | dict[str, Tensor] | None,
    cache: Cache,
    extras: Mapping[str, Any] | None = None,
) -> Tensor:
    """Run tokens over a cache; returns the logits of the last one, ``[B, V]``.

    Args:
        model: A Hugging Face causal model.
        ids: Token ids ``[B, T]``.
        positions: Of these tokens, ``[B, T]``.
        mask: What the model takes as ``attention_mask``: which slots hold no padding, or a mask of
            four dimensions, or one for each kind of layer.
        cache: Knows where the tokens go.
        extras: As in :func:`prefill`.
    """
    names = arguments_of(model)
    arguments: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "use_cache": True,
        # only the logits of the last token are computed
        "logits_to_keep": 1,
        **(extras or {}),
    }
    output = cast(CausalModel, model)(
        **{name: value for name, value in arguments.items() if name in names},
        **{cache_argument(model): cache},
    )
    return output.logits[:, -1]


def arguments_of(model: nn.Module) -> frozenset[str]:
    """The argument names of a model's forward pass, with those of the base of a PEFT wrapper."""
    names = _parameters(type(model).forward)
    get_base: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    base = model if get_base is None else get_base()
    return names if base is model else names | arguments_of(base)


# cached, since every step of an untraced model asks
@functools.cache
def _parameters(forward: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def cache_argument(model: nn.Module) -> str:
    """Name of a model's argument for its keys and values.

    It is ``cache`` since transformers 5.24, ``past_key_values`` before.

    Raises:
        UnsupportedModelError: If its forward pass takes none.
    """
    names = arguments_of(model)
    name = next((name for name in ("cache", "past_key_values") if name in names), None)
    if name is None:
        raise UnsupportedModelError(
            f"the forward pass of {type(model).__name__} takes no keys and values of earlier "
            "tokens (past_key_values): use model.generate"
        )
    return name


def _drop_copies(graph: fx.GraphModule) -> None:
    """Remove operators that return their input, and compute repeated ones once.

    This needs that no operator writes into such a result. A step writes into keys and values only.
    """
    aten = torch.ops.aten
    seen: dict[object, fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            twin = seen.setdefault(("get_attr", node.target), node)
        elif node.op == "call_function" and node.target in (aten.to.dtype, aten.alias.default):
            source, value = node.args[0], node.meta["val"]
            same = source.meta["val"].dtype == value.dtype
            twin = source if same and not node.args[2:] and not node.kwargs else node
        elif node.target is aten.unsqueeze.default:
            twin = seen.setdefault((node.target, *node.args), node)
            # moved to its source, out of the first layer, which then equals the others
            if twin is node and isinstance(node.args[0], fx.Node):
                node.args[0].append(node)
        else:
            continue
        if twin is not node:
            node.replace_all_uses_with(twin)
            graph.graph.erase_node(node)
    graph.recompile()
