"""Let a traced step run our own operators for a few tokens on a CPU, in the place of torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from cats.ops import cpu
from cats.ops.linear import cpu as linear_cpu
from cats.ops.rms_norm import cpu as rms_norm_cpu
from cats.ops.rotary import cpu as rotary_cpu

_ATEN = torch.ops.aten
_CATS = torch.ops.cats

# Operator, then arguments; a name stands for any argument, for the same one wherever it occurs.
_LINEAR = (_ATEN.linear.default, "x", "weight")
_LINEAR_WITH_BIAS = (*_LINEAR, "bias")
_SQUARE = (_ATEN.pow.Tensor_Scalar, "wide", 2)
_SHIFTED = (_ATEN.add.Tensor, (_ATEN.mean.dim, _SQUARE, [-1], True), "eps")
_SCALED = (_ATEN.mul.Tensor, "wide", (_ATEN.rsqrt.default, _SHIFTED))
_NORM = (_ATEN.mul.Tensor, "weight", _SCALED)
_FIRST_HALF = (_ATEN.slice.Tensor, "x", 3, 0, "half")
_SECOND_HALF = (_ATEN.slice.Tensor, "x", 3, "half", 2**63 - 1)
_ROTATED = (_ATEN.cat.default, [(_ATEN.neg.default, _SECOND_HALF), _FIRST_HALF], -1)
_ROTARY = (_ATEN.add.Tensor, (_ATEN.mul.Tensor, "x", "cos"), (_ATEN.mul.Tensor, _ROTATED, "sin"))


def use_cpu_kernels(graph: fx.GraphModule) -> fx.GraphModule:
    """Change a step, in place: linear layers stream their weights, and RMSNorms and rotary
    embeddings become one operator each.

    What is on another device, or in a dtype or layout that the kernels do not take, stays as it is.
    Weights are read where they lie, at each step.
    """
    if cpu.unavailable() is not None:
        return graph
    for node in list(graph.graph.nodes):
        replacement = _linear(node) or _norm(node) or _rotary(node)
        if replacement is None:
            continue
        target, *arguments = replacement
        with graph.graph.inserting_before(node):
            call = graph.graph.call_function(target, tuple(arguments))
        call.meta = node.meta
        node.replace_all_uses_with(call)
        _erase_unused(node)
    graph.recompile()
    return graph


def _linear(node: fx.Node) -> tuple[Any, ...] | None:
    found = _match(_LINEAR, node) or _match(_LINEAR_WITH_BIAS, node)
    if found is None or linear_cpu.refuses(_value(found["x"]), _value(found["weight"])):
        return None
    return _CATS.linear.default, *node.args


def _norm(node: fx.Node) -> tuple[Any, ...] | None:
    found = _match(_NORM, node)
    if found is None:
        return None
    x, weight = _before_cast(found["wide"]), found["weight"]
    # computed in float32, rounded, then multiplied by the weight
    dtypes = {_value(n).dtype for n in (x, weight, node, *node.all_input_nodes)}
    if _value(found["wide"]).dtype != torch.float32 or len(dtypes) > 1:
        return None
    if rms_norm_cpu.refuses(_value(x), _value(weight)):
        return None
    return _CATS.rms_norm.default, x, weight, found["eps"]


def _rotary(node: fx.Node) -> tuple[Any, ...] | None:
    found = _match(_ROTARY, node)
    if found is None:
        return None
    tensors = found["x"], found["cos"], found["sin"]
    if 2 * found["half"] != _value(found["x"]).shape[-1]:
        return None
    return None if rotary_cpu.refuses(*map(_value, tensors)) else (_CATS.rotary.default, *tensors)


def _match(pattern: Any, argument: Any) -> dict[str, Any] | None:
    """What the names in a pattern stand for, or None where it does not fit; casts do not count."""
    found: dict[str, Any] = {}

    def fits(pattern: Any, argument: Any) -> bool:
        if isinstance(pattern, str):
            return bool(found.setdefault(pattern, argument) == argument)
        if isinstance(pattern, list):
            return len(pattern) == len(argument) and all(map(fits, pattern, argument))
        if not isinstance(pattern, tuple):
            return bool(pattern == argument)
        node = _before_cast(argument)
        return (
            isinstance(node, fx.Node)
            and node.target is pattern[0]
            and len(node.args) == len(pattern) - 1
            and not node.kwargs
            and all(map(fits, pattern[1:], node.args))
        )

    return found if fits(pattern, argument) else None


def _before_cast(argument: Any) -> Any:
    is_cast = isinstance(argument, fx.Node) and argument.target is _ATEN.to.dtype
    return argument.args[0] if is_cast else argument


def _value(node: fx.Node) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


def _erase_unused(node: fx.Node) -> None:
    """Erase a node, and what it alone has used; inputs and weights stay."""
    if node.users or node.op != "call_function":
        return
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for source in inputs:
        _erase_unused(source)
