"""Bytes of weights that one decoded token reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import nn

from cats.errors import ConfigError
from cats.model.experts import GatedExperts, are_stacked_experts
from cats.model.find import find_gated_mlps
from cats.model.mlp import GatedMLP
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
        shares: Name of a linear layer to the share of its matrix that is read, or name of a module
            of stacked experts to the share of the experts that a token is routed to; the others are
            read whole.
    """
    causal_model = cast(CausalModel, model)
    embedding, head = causal_model.get_input_embeddings(), causal_model.get_output_embeddings()
    total = float(weight_bytes(model))
    # one row of the embedding is read, unless its table is the output head as well
    if not are_tied(embedding, head):
        total -= weight_bytes(embedding)
    shares = dict(shares or {})
    for experts in _stacked_experts(model):
        total -= experts.bytes - routed_bytes(model, experts) * shares.pop(experts.name, 1.0)
    for name, share in shares.items():
        total -= _layer_bytes(model, name) * (1 - share)
    return total


def routed_bytes(model: nn.Module, mlp: GatedMLP) -> float:
    """Bytes of an MLP that a token of the dense model reads: of experts, those it is routed to."""
    return mlp.bytes * (_routed_share(model, mlp) if isinstance(mlp, GatedExperts) else 1.0)


def _stacked_experts(model: nn.Module) -> list[GatedExperts]:
    # finding MLPs runs each of them
    if not any(are_stacked_experts(module) for module in model.modules()):
        return []
    return [mlp for mlp in find_gated_mlps(model) if isinstance(mlp, GatedExperts)]


def _layer_bytes(model: nn.Module, name: str) -> int:
    weight = weight_of(model.get_submodule(name))
    assert weight is not None
    return weight.bytes


def _routed_share(model: nn.Module, mlp: GatedExperts) -> float:
    """The share of the experts of a layer that a token reads."""
    if getattr(model, "config", None) is None:
        return 1.0
    config = cast(CausalModel, model).config.get_text_config(decoder=True)
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts"):
        chosen = getattr(config, name, None)
        if chosen is not None:
            # a list has the number of each layer
            most = max(chosen) if isinstance(chosen, list | tuple) else chosen
            return min(1.0, float(most) / mlp.experts)
    return 1.0


def share_of_layers(model: nn.Module, shares: Mapping[str, float]) -> float:
    """Share of the bytes of the gated MLPs, and of what else is not read whole, that is read.

    Args:
        model: Any model with gated MLPs.
        shares: As for :func:`token_bytes`.
    """
    mlps = find_gated_mlps(model)
    sizes: dict[str, float] = {}
    for mlp in mlps:
        if isinstance(mlp, GatedExperts):
            sizes[mlp.name] = routed_bytes(model, mlp)
        else:
            sizes |= {f"{mlp.name}.{name}": matrix.bytes for name, matrix in mlp.matrices.items()}
    sizes |= {name: _layer_bytes(model, name) for name in shares.keys() - sizes.keys()}
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
    total = sum(routed_bytes(model, mlp) for mlp in mlps)
    routers = sum(routed_bytes(model, mlp) * mlp.bytes_read(1.0) / mlp.bytes for mlp in mlps)
    if share * total <= routers:
        raise ConfigError(
            f"gate is read whole, so that at least {routers / total:.1%} of the bytes are read, "
            f"got a target of {share:.1%}: a method that drops inputs of gate, such as cascade, "
            "reads less"
        )
    return (1 - share) * total / (total - routers)
