"""What a processor gives beside ids and mask: images, audio, types of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cats.decode.forward import arguments_of
from cats.errors import DataError

_READ = ("input_ids", "attention_mask")
# The loop says these itself, or runs ids alone.
_OWN = frozenset({
    "position_ids", "past_key_values", "cache", "use_cache", "logits_to_keep", "inputs_embeds",
    "labels", "output_attentions", "output_hidden_states", "return_dict", "cache_position",
})  # fmt: skip


def extras_of(inputs: Any, model: nn.Module) -> dict[str, Any]:
    """The entries of ``inputs`` beside ids and mask, which the prompt's pass gets.

    Raises:
        DataError: If the model does not take one of them.
    """
    if not isinstance(inputs, Mapping):
        return {}
    extras = {name: v for name, v in inputs.items() if name not in _READ and v is not None}
    takes = arguments_of(model) - _OWN
    if unknown := sorted(str(name) for name in extras if name not in takes):
        raise DataError(
            f"{type(model).__name__} does not take {', '.join(unknown)} with a prompt: leave it "
            f"out (for example del inputs[{unknown[0]!r}]), or use model.generate"
        )
    return extras


def extras_on(extras: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The same with tensors on the model's device."""
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in extras.items()}
