"""Copies of a model that share its weights."""

from __future__ import annotations

import copy

from torch import nn

from cats.model import find_gated_mlps
from cats.weights import Dense, InputMask, QuantisedLinear


def copy_for_fusion(model: nn.Module) -> nn.Module:
    """A copy that shares all weights except those whose layout ``fuse_`` changes."""
    mlps = find_gated_mlps(model)
    moving = [mlp.down.matrix for mlp in mlps]
    moving += [mlp.gate.matrix for mlp in mlps if isinstance(mlp.gate.layer, InputMask)]
    moved = {id(t) for matrix in moving if isinstance(matrix, Dense) for t in matrix.tensors}
    codes = [
        tensor
        for module in model.modules()
        if isinstance(module, QuantisedLinear)
        for tensor in module.buffers()
    ]
    tensors = (*model.parameters(), *codes)
    return copy.deepcopy(model, {id(t): t for t in tensors if id(t) not in moved})
