"""Names that moved to :mod:`cats.model`: what earlier releases pickled looks for them here."""

from cats.model import (
    CatsActivation,
    GatedMLP,
    activation_kind,
    check_patterns,
    evaluating,
    find_gated_mlps,
    is_sparse,
)

__all__ = [
    "CatsActivation",
    "GatedMLP",
    "activation_kind",
    "check_patterns",
    "evaluating",
    "find_gated_mlps",
    "is_sparse",
]
