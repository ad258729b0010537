"""Bytes of weights that one decoded token reads: the common measure of all ways to be sparse."""

from __future__ import annotations

from torch import nn

from cats.model import GatedMLP, find_gated_mlps


def neuron_share(dropped: float) -> float:
    """Share of an MLP's weights that are read where neurons are dropped.

    The router, one of the three matrices, is read whole; of up and down the kept neurons.
    """
    return (1 + 2 * (1 - dropped)) / 3


def mlp_bytes(mlp: GatedMLP) -> int:
    """Bytes of the matrices of an MLP."""
    return sum(p.numel() * p.element_size() for p in mlp.module.parameters() if p.ndim >= 2)


def mean_share(model: nn.Module, shares: dict[str, float]) -> float:
    """Share of all gated MLPs' weights that a token reads.

    Args:
        model: Any model with gated MLPs.
        shares: Name of an MLP to its share; the others are read whole.
    """
    sizes = {mlp.name: mlp_bytes(mlp) for mlp in find_gated_mlps(model)}
    return sum(size * shares.get(name, 1.0) for name, size in sizes.items()) / sum(sizes.values())


def token_bytes(model: nn.Module, share: float) -> int:
    """Bytes of weights that a token reads, attention and output head included.

    Args:
        model: A causal model.
        share: Share of the gated MLPs' weights that is read.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    # one row of the embedding is read, unless its table is the output head as well
    if head is None or head.weight is not table:
        total -= table.numel() * table.element_size()
    mlps = sum(mlp_bytes(mlp) for mlp in find_gated_mlps(model))
    return round(total - mlps * (1 - share))
