"""Rotary embeddings whose frequencies depend on the length of the text (longrope, dynamic).

transformers chooses the frequencies of a forward pass by its largest position. Keys in a cache keep
those that they were computed with. Some models therefore run the whole text again where it passes
the original context (Phi-3); others go on with keys of both kinds. Both are followed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

_ADAPTIVE = ("longrope", "dynamic")


@dataclass(frozen=True, slots=True)
class LengthRule:
    """How a model's frequencies depend on the length.

    Attributes:
        kind: ``"longrope"``: one set of frequencies up to the original context, one beyond it;
            ``"dynamic"``: beyond it, others for each length.
        original: The original context, in tokens.
        limit: The longest text that the model's settings speak of; None where they do not.
    """

    kind: str
    original: int
    limit: int | None

    @classmethod
    def of(cls, config: Any) -> LengthRule | None:
        """The rule of a text configuration; None where all lengths have the same frequencies."""
        for parameters in _parameter_sets(config):
            kind = str(parameters.get("rope_type"))
            context: Any = getattr(config, "max_position_embeddings", None)
            if kind == "longrope":
                return cls(kind, int(parameters["original_max_position_embeddings"]), context)
            if "dynamic" in kind:
                factor = float(parameters.get("factor") or 1.0)
                return cls("dynamic", int(context), int(context * factor))
        return None

    def range_of(self, length: int) -> int | None:
        """Which frequencies a pass over ``length`` tokens uses; None for ones of that length alone.

        Keys may be used again by a pass with the same number.
        """
        if self.kind == "longrope":
            return int(length > self.original)
        # at the original context itself, what transformers uses depends on what ran before
        return 0 if length < self.original else None


def is_adaptive(module: nn.Module) -> bool:
    """Whether a module is a rotary embedding that stores frequencies as it runs."""
    kind = getattr(module, "rope_type", None)
    kinds = kind.values() if isinstance(kind, dict) else [kind]
    return any(name in str(k) for k in kinds for name in _ADAPTIVE)


def runs_again_at(model: Any, length: int, cache_name: str) -> bool:
    """Whether ``generate`` gives up its cache and runs the whole text where it has this length.

    Args:
        model: A Hugging Face causal model.
        length: Tokens, of which all but the last are cached.
        cache_name: What the model calls the argument for its cache.
    """
    device = next(model.parameters()).device
    ids = torch.zeros(1, length, dtype=torch.int64, device=device)
    cache: Any = DynamicCache()
    states = torch.zeros(1, 1, length - 1, 1, device=device)
    cache.update(states, states, 0)
    inputs = model.prepare_inputs_for_generation(
        ids,
        **{cache_name: cache},
        attention_mask=torch.ones_like(ids),
        next_sequence_length=1,
        use_cache=True,
    )
    return inputs.get(cache_name) is None


def _parameter_sets(config: Any) -> list[dict[str, Any]]:
    """The parameters of each kind of layer; most models have one for all."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        return [parameters]
    return [p for p in parameters.values() if isinstance(p, dict)]
