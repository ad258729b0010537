"""Bytes of weights that a decoded token reads, by which all variants are compared."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from cats.model import find_gated_mlps, traffic


def neuron_shares(model: nn.Module, dropped: Mapping[str, float]) -> dict[str, float]:
    """Name of each MLP to the share of its bytes that a token reads.

    Args:
        model: Any model with gated MLPs.
        dropped: Name of each MLP to the share of its neurons that is dropped.
    """
    return {
        mlp.name: mlp.bytes_read(dropped[mlp.name]) / mlp.bytes
        for mlp in find_gated_mlps(model, names=dropped)
    }


def mean_share(model: nn.Module, shares: Mapping[str, float]) -> float:
    """Share of all gated MLPs' bytes that a token reads.

    Args:
        model: Any model with gated MLPs.
        shares: Name of an MLP to its share; it is 1 for the others.
    """
    sizes = {mlp.name: mlp.bytes for mlp in find_gated_mlps(model)}
    return sum(size * shares.get(name, 1.0) for name, size in sizes.items()) / sum(sizes.values())


def token_bytes(model: nn.Module, share: float) -> int:
    """Bytes of weights that a token reads, attention and output head included.

    Args:
        model: A causal model.
        share: Share of the gated MLPs' bytes that is read.
    """
    mlps = sum(mlp.bytes for mlp in find_gated_mlps(model))
    return round(traffic.token_bytes(model) - mlps * (1 - share))
