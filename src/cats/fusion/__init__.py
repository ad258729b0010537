"""Fused MLPs: one operator, over ordinary or quantised weights, runs instead of a sparse MLP."""

from cats.fusion.base import FusedMLP
from cats.fusion.mlp import FusedGatedMLP
from cats.fusion.model import fuse_, fused_mlps, restore_layout_, take_out_, unfuse_
from cats.fusion.packed import FusedPackedMLP
from cats.fusion.reads import ReadShares

__all__ = [
    "FusedGatedMLP",
    "FusedMLP",
    "FusedPackedMLP",
    "ReadShares",
    "fuse_",
    "fused_mlps",
    "restore_layout_",
    "take_out_",
    "unfuse_",
]
