"""Bytes of weights that a decoded token reads, by which all variants are compared."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from cats.model import GatedExperts, find_gated_mlps, traffic


def mlp_shares(model: nn.Module, layers: Mapping[str, float]) -> dict[str, float]:
    """Name of each MLP that is not read whole to the share of its bytes that a token reads.

    Args:
        model: Any model with gated MLPs.
        layers: Name of a linear layer, or of a module of stacked experts, to the share that is
            read, see :func:`cats.metrics.read_shares`; the others are read whole.
    """
    shares = {}
    for mlp in find_gated_mlps(model):
        if isinstance(mlp, GatedExperts):
            if mlp.name in layers:
                shares[mlp.name] = layers[mlp.name]
            continue
        names = {f"{mlp.name}.{name}": matrix for name, matrix in mlp.matrices.items()}
        if names.keys() & layers.keys():
            read = sum(matrix.bytes * layers.get(name, 1.0) for name, matrix in names.items())
            shares[mlp.name] = read / mlp.bytes
    return shares


def mean_share(model: nn.Module, shares: Mapping[str, float]) -> float:
    """Share of all gated MLPs' bytes that a token reads.

    Args:
        model: Any model with gated MLPs.
        shares: Name of an MLP to its share; it is 1 for the others.
    """
    sizes = {mlp.name: traffic.routed_bytes(model, mlp) for mlp in find_gated_mlps(model)}
    return sum(size * shares.get(name, 1.0) for name, size in sizes.items()) / sum(sizes.values())


def token_bytes(model: nn.Module, layers: Mapping[str, float] | None = None) -> int:
    """Bytes of weights that a token reads, attention and output head included.

    Args:
        model: A causal model.
        layers: As for :func:`mlp_shares`.
    """
    return round(traffic.token_bytes(model, layers))
