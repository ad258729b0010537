"""Run a Hugging Face model over a cache: as it is, or as one flat list of operators."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from cats.decode.cache import SlotCache
from cats.decode.state import State

StepFunction = Callable[[Tensor, Tensor, Tensor, Tensor, list[Tensor]], Tensor]


def prefill(model: nn.Module, state: State, ids: Tensor, start: int) -> Tensor:
    """Logits of the last token, ``[B, V]``, after tokens ``[B, T]`` went to the slots at ``start``.

    Attention reads the slots up to the last new one, without a mask where there is no padding.
    """
    end = start + ids.shape[1]
    state.cache.start, state.cache.window = start, end
    valid = state.valid[:, :end]
    positions = (valid.cumsum(1) - 1).clamp(min=0)[:, start:]
    return _logits(model, ids, positions, valid, state.cache)


def step_function(model: nn.Module, state: State, window: int) -> StepFunction:
    """One token a row as a function of tensors: those of :func:`step_inputs`, to ``[B, V]``.

    Its attention reads ``window`` slots under a mask, so that it is the same for every slot.
    """
    cache = state.cache

    def step(
        tokens: Tensor, positions: Tensor, slot: Tensor, valid: Tensor, stored: list[Tensor]
    ) -> Tensor:
        cache.start, cache.window = slot, window
        with cache.lent(stored):
            return _logits(model, tokens, positions, valid[:, :window], cache)

    return step


def step_inputs(state: State) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """The buffers that a step reads: tokens, positions, slot, valid, and keys and values."""
    return state.tokens, state.positions, state.slot, state.valid, state.cache.buffers()


def flatten(step: StepFunction, state: State) -> fx.GraphModule:
    """The operators that a step runs, in a row, without the Python of its modules.

    Weights and buffers are those of the model, so that what is written into them later is seen.

    Raises:
        Exception: Whatever stops the tracing, a branch on the value of a tensor for one.
    """
    graph = make_fx(step, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)(
        *step_inputs(state)
    )
    _drop_copies(graph)
    return graph


def _logits(
    model: nn.Module, ids: Tensor, positions: Tensor, valid: Tensor, cache: SlotCache
) -> Tensor:
    output: Any = model(
        input_ids=ids,
        attention_mask=valid,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        **_last_only(model),
    )
    logits: Tensor = output.logits[:, -1]
    return logits


def _last_only(model: nn.Module) -> dict[str, int]:
    """The argument that asks for the logits of the last token alone, where there is one."""
    parameters = inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}


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
        else:
            continue
        if twin is not node:
            node.replace_all_uses_with(twin)
            graph.graph.erase_node(node)
    graph.recompile()
