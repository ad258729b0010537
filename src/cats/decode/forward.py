"""Run a Hugging Face model over a cache: as it is, or as one flat list of operators."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import cache as remembered
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from cats.decode.cache import SlotCache
from cats.decode.state import State
from cats.errors import UnsupportedModelError

# Tokens, positions, slot, valid, then keys and values of each layer in turn; to logits [B, V].
StepFunction = Callable[[Tensor, Tensor, Tensor, Tensor, list[Tensor]], Tensor]

# Slots in sight while a step for any number of slots is traced: no dimension of a model.
_TRACED_SLOTS = 59


def prefill(
    model: nn.Module,
    state: State,
    ids: Tensor,
    start: int,
    extras: Mapping[str, Any] | None = None,
) -> Tensor:
    """Logits of the last token, ``[B, V]``, after tokens ``[B, T]`` went to the slots at ``start``.

    Attention reads the slots up to the last new one, without a mask where there is no padding.

    Args:
        model: Runs module by module.
        state: The conversation.
        ids: Token ids ``[B, T]``.
        start: Slots in use before them.
        extras: What the model takes of a prompt beside ids and mask, such as ``pixel_values``.

    Raises:
        UnsupportedModelError: If the model did not write its keys and values as decoding needs.
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
        logits = _logits(model, ids, positions, valid, cache, extras or {})
    return logits.to(state.device)


def step_inputs(
    state: State, slots: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """What a step reads and writes, with the keys and values of all slots or of the first ones."""
    stored = state.cache.buffers()
    if slots is not None:
        stored = [t[:, :, :slots] for t in stored]
    # transformers makes its masks from one number of earlier tokens, so all rows of a traced step
    # have the slot of the first one: the engines eager and compiled step rows together
    return state.tokens, state.positions, state.slots[:1], state.valid, stored


def trace_window(model: nn.Module, state: State, window: int) -> fx.GraphModule:
    """A step as a flat list of operators, without the Python of the model's modules.

    Its attention reads the first ``window`` slots under a mask, so that it serves every slot among
    them, and rows with padding. Weights and buffers are those of the model: what is written into
    them later is seen.

    Raises:
        Exception: Whatever stops the tracing, a branch on the value of a tensor for one.
    """
    cache = state.cache

    def step(
        tokens: Tensor, positions: Tensor, slot: Tensor, valid: Tensor, stored: list[Tensor]
    ) -> Tensor:
        cache.start, cache.newest, cache.window = slot, slot, window
        with cache.lent(stored):
            return _logits(model, tokens, positions, valid[:, :window], cache)

    return _trace(step, step_inputs(state))


def trace_unmasked(model: nn.Module, state: State) -> fx.GraphModule | None:
    """A step for rows without padding that reads as many slots as it is given, without a mask.

    It serves fewer slots than a sliding window has. None where a model needs a step a length.

    Raises:
        Exception: As :func:`trace_window`.
    """
    if state.capacity < _TRACED_SLOTS or state.unmasked_slots < _TRACED_SLOTS:
        return None
    cache = state.cache

    def step(
        tokens: Tensor, positions: Tensor, slot: Tensor, valid: Tensor, stored: list[Tensor]
    ) -> Tensor:
        cache.start, cache.newest, cache.window = _TRACED_SLOTS - 1, slot, _TRACED_SLOTS
        with cache.lent(stored):
            return _logits(model, tokens, positions, None, cache)

    graph = _trace(step, step_inputs(state, _TRACED_SLOTS))
    return None if _mentions(graph, {_TRACED_SLOTS - 1, _TRACED_SLOTS}) else graph


def _trace(step: StepFunction, inputs: tuple[Any, ...]) -> fx.GraphModule:
    # it would log whole tracebacks of operators that cannot be traced, for which we say why
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
    """The same operators on the same weights, to be changed apart."""
    nodes = fx.Graph()
    nodes.output(nodes.graph_copy(graph.graph, {}))
    nodes.set_codegen(graph.graph._codegen)  # which takes the list of keys and values apart
    return fx.GraphModule(graph, nodes)


def _mentions(graph: fx.GraphModule, numbers: set[int]) -> bool:
    found: list[bool] = []

    def visit(argument: Any) -> Any:
        found.append(type(argument) is int and argument in numbers)
        return argument

    for node in graph.graph.nodes:
        pytree.tree_map(visit, (node.args, node.kwargs))
    return any(found)


def _logits(
    model: nn.Module,
    ids: Tensor,
    positions: Tensor,
    valid: Tensor | None,
    cache: SlotCache,
    extras: Mapping[str, Any] | None = None,
) -> Tensor:
    takes = arguments_of(model)
    given: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": valid,
        "position_ids": positions,
        "use_cache": True,
        # the logits of the last token alone
        "logits_to_keep": 1,
        **(extras or {}),
    }
    output: Any = model(
        **{name: value for name, value in given.items() if name in takes},
        **{cache_argument(model): cache},
    )
    logits: Tensor = output.logits[:, -1]
    return logits


def arguments_of(model: nn.Module) -> frozenset[str]:
    """The named arguments of a model's forward pass; those of its base where it is a wrapper."""
    kind: Any = type(model)
    found = _parameters(kind)
    base: Any = getattr(model, "get_base_model", None)
    inner = None if base is None else base()
    return found if inner is None or inner is model else found | arguments_of(inner)


@remembered
def _parameters(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def cache_argument(model: nn.Module) -> str:
    """What a model calls the argument for its keys and values.

    ``cache`` since transformers 5.24, ``past_key_values`` before.

    Raises:
        UnsupportedModelError: If its forward pass takes none.
    """
    takes = arguments_of(model)
    name = next((name for name in ("cache", "past_key_values") if name in takes), None)
    if name is None:
        raise UnsupportedModelError(
            f"the forward pass of {type(model).__name__} takes no keys and values of earlier "
            "tokens (past_key_values): use model.generate"
        )
    return name


def _drop_copies(graph: fx.GraphModule) -> None:
    """Remove operators that return their input, and compute repeated ones once.

    Only operators whose result no one writes to are touched: here all but the keys and values.
    """
    aten = torch.ops.aten
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            twin = seen.setdefault(("get_attr", node.target), node)
        elif node.op == "call_function" and node.target in (aten.to.dtype, aten.alias.default):
            source, value = node.args[0], node.meta["val"]
            same = source.meta["val"].dtype == value.dtype
            twin = source if same and not node.args[2:] and not node.kwargs else node
        elif node.target is aten.unsqueeze.default:
            twin = seen.setdefault((node.target, *node.args), node)
            # next to its source, so that the first layer has the same operators as the others
            if twin is node and isinstance(node.args[0], fx.Node):
                node.args[0].append(node)
        else:
            continue
        if twin is not node:
            node.replace_all_uses_with(twin)
            graph.graph.erase_node(node)
    graph.recompile()
