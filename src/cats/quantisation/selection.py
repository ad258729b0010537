"""Which layers of a model are quantised, and why others or whole models are not."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from cats.errors import ConfigError, UnsupportedModelError
from cats.fusion import fused_mlps
from cats.model import is_sparse
from cats.protocols import CausalModel
from cats.weights import Dense, weight_of
from cats.weights.placement import check_has_weights, is_offloaded

HEAD_BITS = 8
# Tried in this order where a width is no multiple of the group that was asked for.
_SMALLER_GROUPS = (64, 32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What is quantised of a model.

    Attributes:
        layers: Name to each linear layer of the decoder that is quantised.
        head: Name of the output head where it is quantised; None where it is not.
        bits: 4 or 8.
        group_size: Columns that share a scale; None for a scale per row.
    """

    layers: dict[str, nn.Linear]
    head: str | None
    bits: int
    group_size: int | None


def check_bits(bits: int, group_size: int | None) -> int | None:
    """The group size of these options: 128 by default in 4 bits, and a row in 8.

    Args:
        bits: 4 or 8.
        group_size: Columns that share a scale; -1 for a row, None for the default.

    Raises:
        ConfigError: If one is not possible.
    """
    if bits not in (4, 8):
        raise ConfigError(f"bits must be 4 or 8, got {bits}")
    if group_size is not None and group_size < 1 and group_size != -1:
        raise ConfigError(
            f"a group must have at least one column, got {group_size} (-1 is a scale per row)"
        )
    if group_size is None:
        group_size = 128 if bits == 4 else -1
    return None if group_size == -1 else group_size


def select(
    model: nn.Module,
    *,
    bits: int,
    group_size: int | None = None,
    head: bool = False,
    exclude: Sequence[str] = (),
) -> Selection:
    """The linear layers of a model's decoder layers, without those of a vision tower.

    One group size serves all layers, so that a checkpoint has one scheme: the largest of the one
    asked for, 64 and 32 that divides the width of every layer.

    Args:
        model: A Hugging Face causal model with ordinary weights.
        bits: 4 or 8.
        group_size: As for :func:`check_bits`.
        head: Whether the output head is quantised too. Where it is the embedding, the two become
            two matrices.
        exclude: Patterns of layers that stay, such as ``"model.layers.0.*"``.

    Raises:
        ConfigError: If bits or group size are not possible, or a pattern matches no layer.
        UnsupportedModelError: If the model is quantised, sparse or fused, or has other layers or
            another head.
    """
    size = check_bits(bits, group_size)
    _check_model(model)
    prefix, decoder = decoder_layers(model)
    found = dict(_linear_layers(decoder, prefix))
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no nn.Linear in its layers: nothing to quantise"
        )
    for pattern in exclude:
        if not fnmatch.filter(found, pattern):
            raise ConfigError(
                f"exclude {pattern!r} matches no layer that would be quantised, which are named "
                f"like {next(iter(found))!r}"
            )
    chosen = {
        name: layer
        for name, layer in found.items()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)
    }
    if not chosen:
        raise ConfigError(f"exclude {' '.join(exclude)} leaves no layer to quantise")
    layers: dict[str, nn.Linear] = {}
    for name, layer in chosen.items():
        weight = weight_of(layer)
        if not isinstance(layer, nn.Linear) or not isinstance(weight, Dense):
            raise UnsupportedModelError(
                f"{name} is {weight!r} in a {type(layer).__name__}, expected an nn.Linear with "
                "ordinary weights: quantise the model that it was made from"
            )
        layers[name] = layer
    return Selection(
        layers=layers,
        head=_head(model) if head else None,
        bits=bits,
        group_size=None if size is None else _fitting_group(layers, size),
    )


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name of the list of a causal model's decoder layers, and the list.

    Raises:
        UnsupportedModelError: If there is no such list.
    """
    # Any: attributes of a model that may be of another form
    causal_model: Any = model
    try:
        base = causal_model.get_decoder()
        count = causal_model.config.get_text_config(decoder=True).num_hidden_layers
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} is no causal model of transformers ({error})"
        ) from error
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return next(name for name, m in model.named_modules() if m is module), module
    raise UnsupportedModelError(
        f"{type(model).__name__} has no list of {count} decoder layers, as its configuration says"
    )


def _check_model(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "the model is quantised already: quantise the checkpoint in 16 bits"
        )
    if next(iter(fused_mlps(model)), None) is not None:
        raise UnsupportedModelError(
            "the model is fused: cats.unfuse_ it and cats.densify_ it first"
        )
    if is_sparse(model):
        raise UnsupportedModelError(
            "the model is sparse: cats.densify_ it first, and calibrate the quantised model, "
            "whose activations are other ones"
        )
    check_has_weights(model)
    if is_offloaded(model):
        raise UnsupportedModelError("the model is offloaded: load the whole of it on one device")


def _linear_layers(decoder: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, module in decoder.named_modules():
        stacked = [n for n, p in module.named_parameters(recurse=False) if p.ndim == 3]
        if stacked and not isinstance(module, nn.Conv1d):
            raise UnsupportedModelError(
                f"{prefix}.{name}.{stacked[0]} stacks several matrices, as mixtures of experts "
                "do: only models whose matrices are nn.Linear are quantised"
            )
        if isinstance(module, nn.Linear) or weight_of(module) is not None:
            yield f"{prefix}.{name}", module


def _head(model: nn.Module) -> str:
    """Name of the output head."""
    head = cast(CausalModel, model).get_output_embeddings()
    if not isinstance(head, nn.Linear) or not isinstance(weight_of(head), Dense):
        kind = "none" if head is None else f"a {type(head).__name__}"
        raise UnsupportedModelError(
            f"the output head of {type(model).__name__} is {kind}, expected an nn.Linear with "
            "ordinary weights: leave it as it is"
        )
    name: str = next(name for name, module in model.named_modules() if module is head)
    return name


def _fitting_group(layers: dict[str, nn.Linear], size: int) -> int:
    widths = {layer.in_features: name for name, layer in layers.items()}
    tried = [size, *(smaller for smaller in _SMALLER_GROUPS if smaller < size)]
    for group in tried:
        if all(width % group == 0 for width in widths):
            return group
    name = next(name for width, name in widths.items() if width % tried[-1])
    raise ConfigError(
        f"{name} has {layers[name].in_features} columns, which are no whole groups of "
        f"{' or '.join(map(str, tried))}: exclude such layers (--exclude), or take a scale per row "
        "(--group -1)"
    )
