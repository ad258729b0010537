"""Fused MLPs: the operator ``cats::gated_mlp`` runs instead of a model's sparse MLPs."""

from cats.fusion.mlp import FusedGatedMLP
from cats.fusion.model import fuse_, fused_mlps, restore_layout_, take_out_, unfuse_

__all__ = [
    "FusedGatedMLP",
    "fuse_",
    "fused_mlps",
    "restore_layout_",
    "take_out_",
    "unfuse_",
]
