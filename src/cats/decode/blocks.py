"""Find the layers in a step's flat list of operators, so that one compilation serves all of them.

A model's layers run the same operators on different weights. So the list is a head, a block that is
repeated with other inputs, and a tail.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import fx, nn

Compiler = Callable[[fx.GraphModule], Callable[..., object]]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Ranges of nodes with the same operators; what each reads, and what others read of it."""

    ranges: list[list[fx.Node]]
    inputs: list[list[fx.Node]]
    outputs: list[list[fx.Node]]


def compile_blocks(graph: fx.GraphModule, compiler: Compiler) -> fx.GraphModule:
    """Compile head, block and tail of a step, in place; without a repeated block, all in one.

    Args:
        graph: A step.
        compiler: Compiles a graph that returns a tuple.
    """
    _weights_first(graph.graph)
    nodes = [n for n in graph.graph.nodes if n.op == "call_function"]
    blocks = find_blocks(nodes)
    parts = [nodes]
    if blocks is not None:
        first, last = nodes.index(blocks.ranges[0][0]), nodes.index(blocks.ranges[-1][-1])
        parts = [nodes[:first], nodes[last + 1 :]]
        _replace(graph, blocks, compiler)
    for part in parts:
        if part:
            single = _flow([part])
            assert single is not None
            _replace(graph, single, compiler)
    graph.recompile()
    return graph


def find_blocks(nodes: list[fx.Node]) -> Blocks | None:
    """The longest run of equal blocks, cut where the fewest tensors flow on; None without a run."""
    period, start, count = _repetition([_shape_of(n) for n in nodes])
    best: Blocks | None = None
    # every cut of the run is tried; a cut that moves loses one block
    for offset in range(period if count > 2 else 0):
        end = start + offset + period * (count if offset == 0 else count - 1)
        blocks = _flow([nodes[i : i + period] for i in range(start + offset, end, period)])
        if blocks is not None and (best is None or len(blocks.outputs[0]) < len(best.outputs[0])):
            best = blocks
    return best


def _replace(graph: fx.GraphModule, blocks: Blocks, compiler: Compiler) -> None:
    """Replace these ranges by calls of one compiled function."""
    function = compiler(_extract(blocks))

    # a compiled graph is a module, and a node calls a function
    def block(*inputs: object) -> object:
        return function(*inputs)

    replacements: dict[fx.Node, fx.Node] = {}
    for nodes, inputs, outputs in zip(blocks.ranges, blocks.inputs, blocks.outputs, strict=True):
        with graph.graph.inserting_after(nodes[-1]):
            call = graph.graph.call_function(block, tuple(replacements.get(n, n) for n in inputs))
        for index, output in enumerate(outputs):
            with graph.graph.inserting_after(call):
                item = graph.graph.call_function(operator.getitem, (call, index))
            output.replace_all_uses_with(item)
            replacements[output] = item
        for node in reversed(nodes):
            graph.graph.erase_node(node)


def _weights_first(graph: fx.Graph) -> None:
    """Move the weights to the front, so that they are not part of a block."""
    first = next(n for n in graph.nodes if n.op == "call_function")
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        first.prepend(node)


def _shape_of(node: fx.Node) -> Hashable:
    """The operator, its constants, and the shapes of the tensors that it reads."""

    def described(source: fx.Node) -> str:
        value = source.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return source.op
        return f"{tuple(value.shape)} {value.stride()} {value.dtype}"

    arguments = fx.map_arg((node.args, tuple(node.kwargs.items())), described)
    return str(node.target), repr(arguments)


def _repetition(items: list[Hashable]) -> tuple[int, int, int]:
    """Period, start and count of the longest run of equal blocks in a list; count 0 for none."""
    best = (0, 0, 0)
    # an item that is in each block once occurs again after as many items as a block has
    for anchor, occurrences in Counter(items).items():
        if occurrences < 3:
            continue
        indices = [i for i, item in enumerate(items) if item == anchor]
        period = indices[1] - indices[0]
        if any(b - a != period for a, b in pairwise(indices)):
            continue
        start, end = indices[0], indices[0] + period
        while start > 0 and items[start - 1] == items[start - 1 + period]:
            start -= 1
        while end < len(items) and items[end] == items[end - period]:
            end += 1
        count = (end - start) // period
        if count * period > best[0] * best[2]:
            best = period, start, count
    return best


def _flow(ranges: list[list[fx.Node]]) -> Blocks | None:
    """These blocks with their inputs and outputs, or None if they are not wired alike."""
    inputs: list[list[fx.Node]] = []
    wirings: list[list[int]] = []
    output_indices: set[int] = set()
    for nodes in ranges:
        index_of = {node: i for i, node in enumerate(nodes)}
        # numbered from -1 down, in the order in which the block reads them
        outside: dict[fx.Node, int] = {}
        wirings.append(
            [
                index_of[source]
                if source in index_of
                else outside.setdefault(source, -1 - len(outside))
                for node in nodes
                for source in node.all_input_nodes
            ]
        )
        inputs.append(list(outside))
        # every block gets the outputs of all blocks: the last one may have others, for the tail
        output_indices |= {
            i for node, i in index_of.items() if any(user not in index_of for user in node.users)
        }
    if any(wiring != wirings[0] for wiring in wirings):
        return None
    return Blocks(ranges, inputs, [[nodes[i] for i in sorted(output_indices)] for nodes in ranges])


def _extract(blocks: Blocks) -> fx.GraphModule:
    """The first block as a graph of its own."""
    block = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(blocks.inputs[0]):
        copies[node] = block.placeholder(f"input_{index}")
    for node in blocks.ranges[0]:
        copies[node] = block.node_copy(node, copies.__getitem__)
    block.output(tuple(copies[node] for node in blocks.outputs[0]))
    return fx.GraphModule(nn.Module(), block)
