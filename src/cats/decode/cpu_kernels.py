"""Let a traced step on a CPU run our own operators instead of torch's, for a few tokens."""

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
# An operator, then its arguments, which are nodes and constants.
Call = tuple[Any, ...]

# A pattern is an operator, then its arguments. A name stands for any argument; where a name occurs
# twice, both are the same argument.
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
    """Replace linear layers, RMSNorms and rotary embeddings by one operator of ours each, in place.

    What is on another device, or in a dtype or layout that the kernels do not take, stays as it is.
    No weight is copied, so that a later write into it is seen.
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


def _linear(node: fx.Node) -> Call | None:
    names = _match(_LINEAR, node) or _match(_LINEAR_WITH_BIAS, node)
    if names is None or linear_cpu.refuses(_value(names["x"]), _value(names["weight"])):
        return None
    return _CATS.linear.default, *node.args


def _norm(node: fx.Node) -> Call | None:
    names = _match(_NORM, node)
    if names is None:
        return None
    x, weight = _before_cast(names["wide"]), names["weight"]
    # only where it is computed in float32, rounded, and then multiplied by the weight
    dtypes = {_value(n).dtype for n in (x, weight, node, *node.all_input_nodes)}
    if _value(names["wide"]).dtype != torch.float32 or len(dtypes) > 1:
        return None
    if rms_norm_cpu.refuses(_value(x), _value(weight)):
        return None
    return _CATS.rms_norm.default, x, weight, names["eps"]


def _rotary(node: fx.Node) -> Call | None:
    names = _match(_ROTARY, node)
    if names is None:
        return None
    x, cos, sin = names["x"], names["cos"], names["sin"]
    if names["half"] * 2 != _value(x).shape[-1]:
        return None
    if rotary_cpu.refuses(_value(x), _value(cos), _value(sin)):
        return None
    return _CATS.rotary.default, x, cos, sin


def _match(pattern: Call, node: fx.Node) -> dict[str, Any] | None:
    """The arguments that the names in a pattern stand for; None where it does not fit.

    Casts between two operators of the pattern are passed over.
    """
    names: dict[str, Any] = {}

    def fits(pattern: object, argument: Any) -> bool:
        if isinstance(pattern, str):
            return bool(names.setdefault(pattern, argument) == argument)
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

    return names if fits(pattern, node) else None


def _before_cast(argument: Any) -> Any:
    is_cast = isinstance(argument, fx.Node) and argument.target is _ATEN.to.dtype
    return argument.args[0] if is_cast else argument


def _value(node: fx.Node) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


def _erase_unused(node: fx.Node) -> None:
    """Erase a node that nothing uses, and what only it has used; inputs and weights stay."""
    if node.users or node.op != "call_function":
        return
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for source in inputs:
        _erase_unused(source)
