"""Quantise the weights of a model by rounding to the nearest code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from cats.errors import ConfigError
from cats.weights import Dense, Quantised, QuantisedLinear, weight_of
from cats.weights.quantised import packed

Model = TypeVar("Model", bound=nn.Module)


def quantise_(
    model: Model, *, bits: int, group_size: int | None = None, head: bool = False
) -> Model:
    """Round the linear layers of a model to integers with scales, in place.

    Numbers are symmetric around 0, as in compressed-tensors: the scale of a group is its largest
    absolute value over half of the range of codes.

    Args:
        model: A Hugging Face causal model with ordinary weights.
        bits: 4 or 8.
        group_size: Columns that share a scale; None for a scale per row.
        head: Whether the output head is rounded too; a head that is the embedding never is.

    Raises:
        ConfigError: If bits or group size are not possible.

    Example:
        >>> cats.quantisation.quantise_(model, bits=4, group_size=128)
    """
    if bits not in (4, 8):
        raise ConfigError(f"bits must be 4 or 8, got {bits}")
    if group_size is not None and group_size < 1:
        raise ConfigError(f"a group must have at least one column, got {group_size}")
    for name, layer in list(_linear_layers(model, head=head)):
        with torch.no_grad():
            weight = rounded(layer.weight, bits=bits, group_size=group_size)
        model.set_submodule(name, QuantisedLinear(weight, layer.bias, name=name))
    return model


def rounded(values: Tensor, *, bits: int, group_size: int | None = None) -> Quantised:
    """The nearest codes to a matrix ``[rows, columns]``; scales have its dtype."""
    rows, columns = values.shape
    size = min(group_size or columns, columns)
    groups = -(-columns // size)
    half = 2 ** (bits - 1)
    wide = nn.functional.pad(values.detach().float(), (0, groups * size - columns))
    wide = wide.view(rows, groups, size)
    scales = (wide.abs().amax(2) / (half - 0.5)).to(values.dtype)
    # a group of zeros, and one whose scale vanishes in 16 bits
    scales = scales.where(scales > 0, torch.finfo(scales.dtype).tiny)
    codes = (wide / scales.float()[..., None]).round_().clamp_(-half, half - 1) + half
    codes = codes.view(rows, -1)[:, :columns].to(torch.uint8)
    return Quantised(
        codes=codes if bits == 8 else packed(codes),
        scales=scales,
        bits=bits,
        columns=columns,
        group_size=size,
        zero=half,
        arithmetic=values.dtype,
        dtype=values.dtype,
    )


def _linear_layers(model: nn.Module, *, head: bool) -> Iterator[tuple[str, nn.Linear]]:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or not isinstance(weight_of(layer), Dense):
            continue
        tied = embedding is not None and layer.weight is getattr(embedding, "weight", None)
        if layer is output and (not head or tied):
            continue
        yield name, layer
