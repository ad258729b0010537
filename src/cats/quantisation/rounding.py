"""Quantise the weights of a model by rounding to the nearest code."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cats.quantisation.selection import HEAD_BITS, select
from cats.weights import Quantised, QuantisedLinear
from cats.weights.quantised import packed

Model = TypeVar("Model", bound=nn.Module)


def quantise_(
    model: Model,
    *,
    bits: int,
    group_size: int | None = None,
    head: bool = False,
    exclude: tuple[str, ...] = (),
) -> Model:
    """Round the linear layers of a model's decoder to integers with scales, in place.

    Numbers are symmetric around 0, as in compressed-tensors: the scale of a group is its largest
    absolute value over half of the range of codes.

    Args:
        model: A Hugging Face causal model with ordinary weights.
        bits: 4 or 8.
        group_size: Columns that share a scale; -1 for a scale per row. None: 128 in 4 bits, a row
            in 8.
        head: Whether the output head is rounded to 8 bits, with a scale per row. Where it is the
            embedding, the table of the embedding stays as it is, and the head is a matrix of its
            own from then on.
        exclude: Patterns of layers that stay.

    Raises:
        ConfigError: If an option is not possible.
        UnsupportedModelError: If the model is quantised, sparse or fused, or has other layers.

    Example:
        >>> cats.quantisation.quantise_(model, bits=4, group_size=128)
    """
    selection = select(model, bits=bits, group_size=group_size, head=head, exclude=exclude)
    for name, layer in selection.layers.items():
        weight = rounded(layer.weight, bits=bits, group_size=selection.group_size)
        replace_(model, name, layer, weight)
    round_head_(model, selection.head)
    return model


def round_head_(model: nn.Module, name: str | None) -> None:
    """Round the output head to 8 bits; nothing where ``name`` is None."""
    if name is None:
        return
    # Any: attributes of transformers' models
    causal_model: Any = model
    head = model.get_submodule(name)
    assert isinstance(head, nn.Linear)
    replace_(model, name, head, rounded(head.weight, bits=HEAD_BITS))
    if getattr(causal_model.config, "tie_word_embeddings", False):
        # else transformers would look for the head in the embedding when it saves and loads
        causal_model.config.tie_word_embeddings = False
        tied = causal_model.all_tied_weights_keys
        causal_model.all_tied_weights_keys = {
            target: source for target, source in tied.items() if target != f"{name}.weight"
        }


def replace_(model: nn.Module, name: str, layer: nn.Linear, weight: Quantised) -> None:
    """Put a quantised layer in the place of a linear one."""
    new = QuantisedLinear(weight, layer.bias, name=name)
    model.set_submodule(name, new.train(layer.training))


def rounded(values: Tensor, *, bits: int, group_size: int | None = None) -> Quantised:
    """The nearest codes to a matrix ``[rows, columns]``; scales have its dtype."""
    wide = in_groups(values, group_size)
    scales = scales_of(wide, bits, values.dtype)
    codes = codes_of(wide, scales[..., None].float(), bits)
    codes = codes.flatten(1)[:, : values.shape[1]]
    return of_codes(codes, scales, bits=bits, group_size=wide.shape[2], like=values)


def in_groups(values: Tensor, group_size: int | None) -> Tensor:
    """``[rows, columns]`` to float32 ``[rows, G, group_size]``, with zeros at the end."""
    rows, columns = values.shape
    size = min(group_size or columns, columns)
    groups = -(-columns // size)
    wide = nn.functional.pad(values.detach().float(), (0, groups * size - columns))
    return wide.view(rows, groups, size)


def scales_of(groups: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The largest absolute value of each group over half of the range of codes."""
    return positive((groups.abs().amax(2) / (2 ** (bits - 1) - 0.5)).to(dtype))


def positive(scales: Tensor) -> Tensor:
    """No scale of 0: a group may be all zeros, and a scale may vanish in 16 bits."""
    result: Tensor = scales.where(scales > 0, torch.finfo(scales.dtype).tiny)
    return result


def codes_of(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The nearest codes, uint8."""
    half = 2 ** (bits - 1)
    codes = (values / scales).round_().clamp_(-half, half - 1)
    result: Tensor = codes.add_(half).to(torch.uint8)
    return result


def of_codes(
    codes: Tensor, scales: Tensor, *, bits: int, group_size: int, like: Tensor
) -> Quantised:
    """Codes, one in each byte, as a weight instead of ``like``."""
    return Quantised(
        codes=codes.contiguous() if bits == 8 else packed(codes),
        scales=scales,
        bits=bits,
        columns=codes.shape[1],
        group_size=group_size,
        zero=2 ** (bits - 1),
        arithmetic=like.dtype,
        dtype=like.dtype,
    )
