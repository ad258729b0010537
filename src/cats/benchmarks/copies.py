"""Copies of a model that share its weights."""

from __future__ import annotations

import copy

from torch import nn

from cats.model import find_gated_mlps


def copy_for_fusion(model: nn.Module) -> nn.Module:
    """A copy that shares all weights except those whose layout ``fuse_`` changes."""
    moved = {id(t) for mlp in find_gated_mlps(model) for t in mlp.down.matrix.tensors}
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in moved})
