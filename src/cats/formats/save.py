"""Write models that were quantised here as compressed-tensors checkpoints (pack-quantized)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cats.errors import UnsupportedModelError
from cats.formats.load import StoredConfig, StoredQuantizer
from cats.weights import Quantised, QuantisedLinear
from cats.weights.quantised import FLOAT8

Model = TypeVar("Model", bound=nn.Module)


def store_packed_(model: Model) -> Model:
    """Let ``model.save_pretrained`` write quantised layers as compressed-tensors, pack-quantized.

    Numbers are not changed. Other libraries read such a checkpoint: transformers, where
    compressed-tensors is installed, and vLLM.

    Args:
        model: A model of transformers with :class:`QuantisedLinear` layers of symmetric codes.

    Raises:
        UnsupportedModelError: If a layer is not quantised in a way that this format has.
    """
    # Any: transformers adds attributes to the models that it quantises
    stored_model: Any = model
    layers = {n: m.matrix for n, m in model.named_modules() if isinstance(m, QuantisedLinear)}
    for name, weight in layers.items():
        _check(name, weight)
    config = StoredConfig(stored=_settings(model, layers))
    quantiser = StoredQuantizer(config)
    quantiser.like = {name: _like(weight) for name, weight in layers.items()}
    stored_model.hf_quantizer = quantiser
    stored_model.config.quantization_config = config
    stored_model.is_quantized = True
    return model


def _check(name: str, weight: Quantised) -> None:
    plain = weight.zeros is None and weight.shifts is None and weight.column_order is None
    symmetric = weight.codes.dtype != FLOAT8 and weight.zero == 2 ** (weight.bits - 1)
    whole = weight.columns % weight.group_size == 0
    same = weight.arithmetic == weight.scales.dtype
    if not (plain and symmetric and whole and same):
        raise UnsupportedModelError(
            f"{name} is {weight!r}, expected symmetric integers in whole groups: pack-quantized "
            "holds no other kind"
        )


def _settings(model: nn.Module, layers: dict[str, Quantised]) -> dict[str, Any]:
    """The ``quantization_config``: the scheme of most layers is that of all linear layers."""
    schemes: dict[tuple[int, int | None], list[str]] = defaultdict(list)
    sizes = {(w.bits, w.group_size) for w in layers.values() if w.groups > 1}
    for name, weight in layers.items():
        # a row may be as wide as the groups of other layers
        in_groups = (weight.bits, weight.group_size) in sizes
        schemes[weight.bits, weight.group_size if in_groups else None].append(name)
    most, *others = sorted(schemes, key=lambda scheme: -len(schemes[scheme]))
    targets = {most: ["Linear"]} | {scheme: schemes[scheme] for scheme in others}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {"targets": names, "weights": _arguments(*scheme)}
            for i, (scheme, names) in enumerate(targets.items())
        },
        "ignore": [name for name, m in model.named_modules() if isinstance(m, nn.Linear)],
    }


def _arguments(bits: int, group_size: int | None) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
        "dynamic": False,
    }


def _like(weight: Quantised) -> dict[str, Tensor]:
    """What a layer would have been read from, as :meth:`cats.formats.Format.write` takes it."""
    rows, columns = weight.shape
    words = -(-columns * weight.bits // 32)
    return {
        "weight_packed": torch.empty(rows, words, dtype=torch.int32, device="meta"),
        "weight_scale": weight.scales.to("meta"),
        "weight_shape": torch.tensor([rows, columns]),
    }
