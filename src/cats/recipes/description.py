"""Sizes of a model, from its configuration: no weight is read."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from cats.checkpoint import first_line
from cats.errors import UnsupportedModelError
from cats.model import find_gated_mlps
from cats.protocols import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Sizes of a causal model.

    Attributes:
        model: Name of its class.
        layers: Number of layers.
        hidden_size: ``D``.
        parameters: Number of parameters; tied ones count once.
        dtype: Dtype in which it is stored; None where its configuration does not say.
        gated_mlps: Number of MLPs that can be made sparse.
        intermediate_sizes: Each ``F`` that occurs among these MLPs.
        activations: Each activation that occurs among these MLPs.
        refusal: Why no MLP can be made sparse; empty where some can.
    """

    model: str
    layers: int
    hidden_size: int
    parameters: int
    dtype: str | None
    gated_mlps: int = 0
    intermediate_sizes: tuple[int, ...] = ()
    activations: tuple[str, ...] = ()
    refusal: str = ""


def architecture(config: ModelConfig, *, trust_remote_code: bool = False) -> Architecture:
    """Sizes of the model that a configuration describes.

    Args:
        config: Configuration of a Hugging Face model.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        UnsupportedModelError: If it is not a causal model.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(f"no causal model: {first_line(error)}") from error
    text = config.get_text_config(decoder=True)
    dtype = getattr(config, "dtype", None)
    common: dict[str, Any] = {
        "model": type(model).__name__,
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(dtype).removeprefix("torch.") if dtype else None,
    }
    same_kind: dict[Hashable, list[str]] = {}
    for name, module in model.named_modules():
        shapes = tuple(p.shape for p in module.parameters())
        same_kind.setdefault((type(module), shapes), []).append(name)
    # only one module of each kind is probed, since a probe of large weights takes a second
    counts = {names[0]: len(names) for names in same_kind.values()}
    try:
        mlps = find_gated_mlps(model, names=counts)
    except UnsupportedModelError as error:
        return Architecture(**common, refusal=str(error))
    return Architecture(
        **common,
        gated_mlps=sum(counts[mlp.name] for mlp in mlps),
        intermediate_sizes=tuple(dict.fromkeys(mlp.intermediate_size for mlp in mlps)),
        activations=tuple(dict.fromkeys(mlp.activation for mlp in mlps)),
    )
