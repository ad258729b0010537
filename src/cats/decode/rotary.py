"""Rotary embeddings whose frequencies depend on the length of the text (longrope, dynamic).

transformers chooses the frequencies of a forward pass by its largest position. Keys in a cache keep
those that they were computed with. So some models (Phi-3) run the whole text again once it is
longer than the original context. Others go on with keys of both kinds. Decoding does the same as
the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cats.protocols import CausalModel, ModelConfig

_ADAPTIVE = ("longrope", "dynamic")
# How names of attributes end that such a module writes as it runs.
_WRITTEN = ("inv_freq", "max_seq_len_cached", "attention_scaling")
# Those attributes of one module: frequencies, lengths and factors.
Frequencies = dict[str, Tensor | float]


@dataclass(frozen=True, slots=True)
class LengthRule:
    """How a model's frequencies depend on the length.

    Attributes:
        kind: ``"longrope"`` has one set of frequencies up to the original context, and another
            for longer texts. ``"dynamic"`` has another set for each longer length.
        original: The original context, in tokens.
        limit: The longest text that the configuration allows; None where it does not say.
    """

    kind: str
    original: int
    limit: int | None

    @classmethod
    def of(cls, config: ModelConfig) -> LengthRule | None:
        """The rule of a text configuration; None where all lengths have the same frequencies."""
        context: Any = getattr(config, "max_position_embeddings", None)
        for parameters in _parameter_sets(config):
            kind = str(parameters.get("rope_type"))
            if kind == "longrope":
                return cls(kind, int(parameters["original_max_position_embeddings"]), context)
            if "dynamic" in kind:
                factor = float(parameters.get("factor") or 1.0)
                return cls("dynamic", int(context), int(context * factor))
        return None

    def range_of(self, length: int) -> int | None:
        """A number for the frequencies that a pass over ``length`` tokens uses.

        A pass can use the stored keys of a pass with the same number. None means that no pass of
        another length has these frequencies.
        """
        if self.kind == "longrope":
            return int(length > self.original)
        # with exactly the original context, what transformers uses depends on what ran before
        return 0 if length < self.original else None


def is_adaptive(module: nn.Module) -> bool:
    """Whether a module is a rotary embedding that stores frequencies as it runs."""
    kind = getattr(module, "rope_type", None)
    kinds = kind.values() if isinstance(kind, dict) else [kind]
    return any(name in str(k) for k in kinds for name in _ADAPTIVE)


@contextmanager
def frequencies_of_one_text(
    model: nn.Module, stored: list[Frequencies] | None
) -> Iterator[list[Frequencies]]:
    """Within the block, the rotary modules hold the frequencies of one text.

    A dynamic module stores the frequencies of the longest text that it has seen. After the block,
    it holds again what it held before.

    Args:
        model: A model whose rule is ``"dynamic"``.
        stored: What this text's last block yielded; None for a new text.

    Yields:
        A list, empty within the block. At its end it gets what the modules then hold.
    """
    modules = [module for module in model.modules() if is_adaptive(module)]
    of_others = [_frequencies(module) for module in modules]
    at_the_end: list[Frequencies] = []
    for index, module in enumerate(modules):
        _restore(module, _of_a_new_text(module) if stored is None else stored[index])
    try:
        yield at_the_end
    finally:
        at_the_end.extend(map(_frequencies, modules))
        for module, values in zip(modules, of_others, strict=True):
            _restore(module, values)


def _frequencies(module: nn.Module) -> Frequencies:
    """What a module holds now."""
    return {
        name: value
        for name, value in {**vars(module), **module._buffers}.items()
        if name.endswith(_WRITTEN) and not name.endswith("original_inv_freq")
    }


def _of_a_new_text(module: nn.Module) -> Frequencies:
    """What a module holds before it has seen any text."""
    values: Frequencies = {}
    for name, value in _frequencies(module).items():
        original = getattr(module, f"{name.removesuffix('inv_freq')}original_inv_freq", None)
        if name == "max_seq_len_cached":
            values[name] = vars(module)["original_max_seq_len"]
        # the length per kind of layer comes with the first long text, so it is left out
        elif not name.endswith("max_seq_len_cached"):
            values[name] = value if original is None else original.to(cast(Tensor, value).device)
    return values


def _restore(module: nn.Module, values: Frequencies) -> None:
    for name in _frequencies(module).keys() - values.keys():
        delattr(module, name)
    for name, value in values.items():
        if name in module._buffers:
            module._buffers[name] = cast(Tensor, value)
        else:
            setattr(module, name, value)


def runs_again_at(model: nn.Module, length: int, cache_name: str) -> bool:
    """Whether ``model.generate`` drops its cache at this length, and runs the whole text again.

    Args:
        model: A Hugging Face causal model.
        length: Tokens of the text, all of them cached except the last.
        cache_name: The name of the model's argument for its cache.
    """
    device = next(model.parameters()).device
    ids = torch.zeros(1, length, dtype=torch.int64, device=device)
    cache = DynamicCache()
    states = torch.zeros(1, 1, length - 1, 1, device=device)
    cache.update(states, states, 0)
    inputs = cast(CausalModel, model).prepare_inputs_for_generation(
        ids,
        **{cache_name: cache},
        attention_mask=torch.ones_like(ids),
        next_sequence_length=1,
        use_cache=True,
    )
    return inputs.get(cache_name) is None


def _parameter_sets(config: ModelConfig) -> list[dict[str, Any]]:
    """The rotary parameters of each kind of layer; most models have one set for all layers."""
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        return [parameters]
    return [p for p in parameters.values() if isinstance(p, dict)]
