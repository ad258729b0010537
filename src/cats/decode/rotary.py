"""Rotary embeddings whose frequencies depend on the length of the text (longrope, dynamic).

transformers chooses the frequencies of a forward pass by its largest position. Keys in a cache keep
those that they were computed with. Some models therefore run the whole text again where it passes
the original context (Phi-3); others go on with keys of both kinds. Both are followed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def frequencies_of_one_text(
    model: nn.Module, kept: list[dict[str, Any]] | None
) -> Iterator[list[dict[str, Any]]]:
    """Within the block the rotary modules hold the frequencies of one text, not of the last one.

    A dynamic module stores those of the longest text that it has seen. Afterwards it holds again
    what it held before.

    Args:
        model: A model whose rule is ``"dynamic"``.
        kept: What the text had stored when the block ended last; None at its beginning.

    Yields:
        A list that holds what is stored when the block has ended.
    """
    modules = [module for module in model.modules() if is_adaptive(module)]
    before = [_stored(module) for module in modules]
    now: list[dict[str, Any]] = []
    for index, module in enumerate(modules):
        _store(module, _fresh(module) if kept is None else kept[index])
    try:
        yield now
    finally:
        now.extend(_stored(module) for module in modules)
        for module, values in zip(modules, before, strict=True):
            _store(module, values)


_STORED = ("inv_freq", "max_seq_len_cached", "attention_scaling")


def _stored(module: nn.Module) -> dict[str, Any]:
    values = {**vars(module), **module._buffers}
    return {
        name: value
        for name, value in values.items()
        if name.endswith(_STORED) and not name.endswith("original_inv_freq")
    }


def _fresh(module: Any) -> dict[str, Any]:
    """What a module holds that has seen no text."""
    found = {}
    for name, value in _stored(module).items():
        prefix = name.removesuffix("inv_freq")
        original = getattr(module, f"{prefix}original_inv_freq", None)
        if name.endswith("max_seq_len_cached"):
            if name == "max_seq_len_cached":
                found[name] = module.original_max_seq_len
        else:
            found[name] = value if original is None else original.to(value.device)
    return found


def _store(module: nn.Module, values: dict[str, Any]) -> None:
    for name in _stored(module).keys() - values.keys():
        delattr(module, name)
    for name, value in values.items():
        if name in module._buffers:
            module._buffers[name] = value
        else:
            setattr(module, name, value)


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
