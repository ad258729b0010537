"""Copies of a model that share its weights."""

from __future__ import annotations

import copy

from torch import nn

from cats.model import find_gated_mlps
from cats.weights import Dense, QuantisedLinear


def copy_for_fusion(model: nn.Module) -> nn.Module:
    """A copy that shares all weights except those whose layout ``fuse_`` changes."""
    downs = [mlp.down.matrix for mlp in find_gated_mlps(model)]
    moved = {id(t) for down in downs if isinstance(down, Dense) for t in down.tensors}
    codes = [
        tensor
        for module in model.modules()
        if isinstance(module, QuantisedLinear)
        for tensor in module.buffers()
    ]
    tensors = (*model.parameters(), *codes)
    return copy.deepcopy(model, {id(t): t for t in tensors if id(t) not in moved})
