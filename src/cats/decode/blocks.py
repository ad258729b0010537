"""Find the layers in the flat list of a step's operators, so that one compilation serves them all.

A model's layers run the same operators on different weights. The list of a step is then a head, a
block that is repeated with other inputs, and a tail.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn

Compiler = Callable[[fx.GraphModule], Callable[..., Any]]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Ranges of a graph's nodes with the same operators, and what flows into and out of each."""

    ranges: list[list[fx.Node]]
    inputs: list[list[fx.Node]]
    outputs: list[list[fx.Node]]


def compile_blocks(graph: fx.GraphModule, compiler: Compiler) -> fx.GraphModule:
    """Compile head, block and tail of a step, in place; without a repeated block, the whole.

    Args:
        graph: A step.
        compiler: Makes a function of a graph whose result is a tuple.
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
    """The longest run of equal blocks, cut where least flows from one to the next; or None."""
    period, start, count = _repetition([_shape_of(n) for n in nodes])
    best: Blocks | None = None
    # every cut of the run into whole blocks is tried; one block is lost where the cut moves
    for offset in range(period if count > 2 else 0):
        whole = count if offset == 0 else count - 1
        first = start + offset
        blocks = _flow([nodes[first + i * period : first + (i + 1) * period] for i in range(whole)])
        if blocks is not None and (best is None or len(blocks.outputs[0]) < len(best.outputs[0])):
            best = blocks
    return best


def _replace(graph: fx.GraphModule, blocks: Blocks, compiler: Compiler) -> None:
    """Put calls of one compiled function in the place of these ranges."""
    function = compiler(_extract(blocks))

    def block(*inputs: Any) -> Any:
        return function(*inputs)

    handed: dict[fx.Node, fx.Node] = {}
    for nodes, inputs, outputs in zip(blocks.ranges, blocks.inputs, blocks.outputs, strict=True):
        with graph.graph.inserting_after(nodes[-1]):
            call = graph.graph.call_function(block, tuple(handed.get(n, n) for n in inputs))
        for index, output in enumerate(outputs):
            with graph.graph.inserting_after(call):
                item = graph.graph.call_function(operator.getitem, (call, index))
            # for the shapes that those who read it are described by
            item.meta = output.meta
            output.replace_all_uses_with(item)
            handed[output] = item
        for node in reversed(nodes):
            graph.graph.erase_node(node)


def _weights_first(graph: fx.Graph) -> None:
    """Move the weights to the front, where they are no part of a block."""
    first = next(n for n in graph.nodes if n.op == "call_function")
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        first.prepend(node)


def _shape_of(node: fx.Node) -> Any:
    """The operator, its constants, and the shapes of what it reads and returns."""

    def described(argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return repr(argument)
        value = argument.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return argument.op
        return tuple(value.shape), value.stride(), value.dtype

    arguments = fx.map_arg((node.args, tuple(node.kwargs.items())), described)
    return str(node.target), repr(arguments)


def _repetition(items: list[Any]) -> tuple[int, int, int]:
    """Period, start and count of the longest run of equal blocks in a list; count 0 for none."""
    best = (0, 0, 0)
    # an item that is in each block once is as far from its next occurrence as blocks are long
    for anchor, occurrences in Counter(items).items():
        if occurrences < 3:
            continue
        places = [i for i, item in enumerate(items) if item == anchor]
        period = places[1] - places[0]
        if any(b - a != period for a, b in pairwise(places)):
            continue
        start, end = places[0], places[0] + period
        while start > 0 and items[start - 1] == items[start - 1 + period]:
            start -= 1
        while end < len(items) and items[end] == items[end - period]:
            end += 1
        count = (end - start) // period
        if count * period > best[0] * best[2]:
            best = period, start, count
    return best


def _flow(ranges: list[list[fx.Node]]) -> Blocks | None:
    """What flows through these blocks, or None if they are not wired alike."""
    inputs, outputs, wirings = [], [], []
    for nodes in ranges:
        place = {node: i for i, node in enumerate(nodes)}
        outside: dict[fx.Node, int] = {}
        wiring: list[Any] = []
        for node in nodes:
            for source in node.all_input_nodes:
                if source in place:
                    wiring.append(place[source])
                else:
                    wiring.append(-1 - outside.setdefault(source, len(outside)))
        used = [n for n in nodes if any(user not in place for user in n.users)]
        inputs.append(list(outside))
        outputs.append(used)
        wirings.append((wiring, [place[n] for n in used]))
    if any(wiring[0] != wirings[0][0] for wiring in wirings):
        return None
    # what one block hands on, every block hands on; a cut just before the tail may differ
    handed = sorted({i for _, used in wirings for i in used})
    return Blocks(ranges, inputs, [[nodes[i] for i in handed] for nodes in ranges])


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
