"""What a processor gives beside ids and mask: images, audio, types of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cats.decode.forward import arguments_of
from cats.errors import DataError

_IDS_AND_MASK = ("input_ids", "attention_mask")
# The decode loop sets these itself, or has no use for them: it runs ids.
_OF_THE_CACHE = {"past_key_values", "cache", "use_cache", "cache_position"}
_OF_THE_OUTPUT = {"output_attentions", "output_hidden_states", "return_dict", "logits_to_keep"}
_NOT_OF_A_PROMPT = {*_OF_THE_CACHE, *_OF_THE_OUTPUT, "position_ids", "inputs_embeds", "labels"}


def extras_of(inputs: object, model: nn.Module) -> dict[str, Any]:
    """The entries of ``inputs`` beside ids and mask, which the prompt's forward pass gets.

    Raises:
        DataError: If the model does not take one of them.
    """
    if not isinstance(inputs, Mapping):
        return {}
    extras = {name: v for name, v in inputs.items() if name not in _IDS_AND_MASK and v is not None}
    accepted = arguments_of(model) - _NOT_OF_A_PROMPT
    if unknown := sorted(str(name) for name in extras if name not in accepted):
        raise DataError(
            f"{type(model).__name__} does not take {', '.join(unknown)} with a prompt: leave it "
            f"out (for example del inputs[{unknown[0]!r}]), or use model.generate"
        )
    return extras


def extras_on(extras: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The same entries, with their tensors on ``device``."""
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in extras.items()}
