"""Bytes of weights that one decoded token reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import nn

from cats.errors import ConfigError
from cats.model.find import find_gated_mlps
from cats.protocols import CausalModel
from cats.weights import are_tied, nbytes, weight_of


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights of a model; a weight that several layers share counts once."""
    counted: set[int] = set()
    total = 0
    for module in model.modules():
        weight = weight_of(module)
        if weight is None:
            continue
        tensors = {id(tensor) for tensor in weight.tensors}
        if not tensors & counted:
            total += weight.bytes
        counted |= tensors
    return total + sum(nbytes(p) for p in model.parameters() if id(p) not in counted)


def token_bytes(model: nn.Module, shares: Mapping[str, float] | None = None) -> float:
    """Bytes of weights that a token reads, attention and output head included.

    Args:
        model: A causal model.
        shares: Name of a linear layer to the share of its matrix that is read; the others are read
            whole.
    """
    causal_model = cast(CausalModel, model)
    embedding, head = causal_model.get_input_embeddings(), causal_model.get_output_embeddings()
    total = float(weight_bytes(model))
    # one row of the embedding is read, unless its table is the output head as well
    if not are_tied(embedding, head):
        total -= weight_bytes(embedding)
    for name, share in (shares or {}).items():
        weight = weight_of(model.get_submodule(name))
        assert weight is not None
        total -= weight.bytes * (1 - share)
    return total


def share_of_layers(model: nn.Module, shares: Mapping[str, float]) -> float:
    """Share of the bytes of the gated MLPs, and of what else is not read whole, that is read.

    Args:
        model: Any model with gated MLPs.
        shares: As for :func:`token_bytes`.
    """
    mlps = find_gated_mlps(model)
    sizes = {f"{mlp.name}.{n}": m.bytes for mlp in mlps for n, m in mlp.matrices.items()}
    for name in shares:
        weight = weight_of(model.get_submodule(name))
        assert weight is not None
        sizes[name] = weight.bytes
    read = sum(size * shares.get(name, 1.0) for name, size in sizes.items())
    return read / sum(sizes.values())


def sparsity_at(model: nn.Module, share: float, *, exclude: Sequence[str] = ()) -> float:
    """The share of neurons to drop, so that a token reads a share of the bytes of its gated MLPs.

    Args:
        model: Any model with gated MLPs.
        share: Of the bytes of the MLPs that are not excluded, inside (0, 1).
        exclude: Patterns of module names to leave out.

    Raises:
        ConfigError: If the routers alone, which are read whole, are a larger share.
    """
    mlps = find_gated_mlps(model, exclude=exclude)
    total = sum(mlp.bytes for mlp in mlps)
    routers = sum(mlp.bytes_read(1.0) for mlp in mlps)
    if share * total <= routers:
        raise ConfigError(
            f"gate is read whole, so that at least {routers / total:.1%} of the bytes are read, "
            f"got a target of {share:.1%}: a method that drops inputs of gate, such as cascade, "
            "reads less"
        )
    return (1 - share) * total / (total - routers)
