"""Bytes of weights that one decoded token reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from cats.model.experts import GatedExperts, are_stacked_experts
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


def token_bytes(model: nn.Module, dropped: Mapping[str, float] | None = None) -> float:
    """Bytes of weights that a token reads, attention and output head included.

    Args:
        model: A causal model.
        dropped: Name of a gated MLP to the share of its neurons that is dropped; the others are
            read completely.
    """
    causal_model = cast(CausalModel, model)
    embedding, head = causal_model.get_input_embeddings(), causal_model.get_output_embeddings()
    total = float(weight_bytes(model))
    # one row of the embedding is read, unless its table is the output head as well
    if not are_tied(embedding, head):
        total -= weight_bytes(embedding)
    is_mixture = any(are_stacked_experts(module) for module in model.modules())
    for mlp in find_gated_mlps(model) if dropped or is_mixture else ():
        share = _routed_share(model, mlp) if isinstance(mlp, GatedExperts) else 1.0
        total -= mlp.bytes - share * mlp.bytes_read((dropped or {}).get(mlp.name, 0.0))
    return total


def _routed_share(model: nn.Module, mlp: GatedExperts) -> float:
    """The share of the experts of a layer that a token reads."""
    config = cast(CausalModel, model).config.get_text_config(decoder=True)
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts"):
        chosen = getattr(config, name, None)
        if chosen is not None:
            # a list has the number of each layer
            most = max(chosen) if isinstance(chosen, list | tuple) else chosen
            return min(1.0, float(most) / mlp.experts)
    return 1.0
