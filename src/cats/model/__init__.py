"""One description of a model's layers, found by structure and probe, and what it is used for."""

from cats.model.activation import CatsActivation, activation_kind, is_sparse
from cats.model.decoder import Decoder, DecoderLayer, describe_decoder
from cats.model.experts import GatedExperts
from cats.model.find import check_patterns, find_gated_mlps
from cats.model.linear import Linear
from cats.model.mlp import GatedMLP, GatedOperands
from cats.model.modules import Replacement, evaluating, has_other_forward, is_hooked, share_hooks
from cats.model.probe import Layout
from cats.model.routes import RoutedExperts, Routes, watched_routes
from cats.model.slot import restore_
from cats.model.swapped import unswap_

__all__ = [
    "CatsActivation",
    "Decoder",
    "DecoderLayer",
    "GatedExperts",
    "GatedMLP",
    "GatedOperands",
    "Layout",
    "Linear",
    "Replacement",
    "RoutedExperts",
    "Routes",
    "activation_kind",
    "check_patterns",
    "describe_decoder",
    "evaluating",
    "find_gated_mlps",
    "has_other_forward",
    "is_hooked",
    "is_sparse",
    "restore_",
    "share_hooks",
    "unswap_",
    "watched_routes",
]
