"""Let the linear layers of a traced step run as ``cats::linear``, where that is faster."""

from __future__ import annotations

import torch
from torch import fx

from cats.ops import cpu


def stream_linears(graph: fx.GraphModule) -> fx.GraphModule:
    """Replace the linear layers of a step, in place, by the kernel that streams their weights.

    Layers on another device, in a dtype that the kernel does not take, or whose weight is not
    row-major stay as they are. Weights are read where they lie, at each step.
    """
    if cpu.unavailable() is None:
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.linear.default and _is_taken(*node.args):
                node.target = torch.ops.cats.linear.default
        graph.recompile()
    return graph


def _is_taken(x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> bool:
    return cpu.linear_refuses(x.meta["val"], weight.meta["val"]) is None
