"""What a quantised checkpoint holds, from its configuration and the headers of its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from cats.errors import UnsupportedModelError
from cats.formats.base import Format, Layer
from cats.formats.gguf import read_header, split
from cats.formats.load import format_or_reason, header_of, layers_of
from cats.weights import Quantised


def stored_kind(config: Any) -> str | None:
    """Name of the format of a checkpoint, and whether it is read here; None where it is dense."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    found = format_or_reason(settings)
    if isinstance(found, Format):
        layout = settings.get("format") if isinstance(settings, Mapping) else None
        return found.name + (f" ({layout})" if layout else "")
    return f"{found}: not read here, transformers loads it with its own library"


def stored_layers(folder: str | Path, config: Any) -> dict[str, Quantised]:
    """Name to each quantised layer of a folder, on ``meta``; no weight is read.

    Args:
        folder: Of a checkpoint of a format that is read here.
        config: Its configuration.

    Raises:
        FormatError: If tensors do not fit.
        UnsupportedModelError: If layers are quantised that are not linear.
    """
    format_ = format_or_reason(config.quantization_config)
    assert isinstance(format_, Format)
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    modules = dict(model.named_modules())
    files = sorted(map(str, Path(folder).glob("*.safetensors")))
    found = {}
    for name, tensors in layers_of(header_of(files, format_), format_).items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise UnsupportedModelError(f"{name} is quantised, but it is no nn.Linear")
        found[name] = format_.read(
            Layer(
                name=name,
                rows=linear.out_features,
                columns=linear.in_features,
                dtype=linear.weight.dtype,
                tensors=tensors,
            )
        )
    return found


def gguf_kinds(path: str | Path) -> dict[str, int]:
    """Kind of block to the number of matrices of a GGUF file that are stored in it."""
    assert split(path) is not None
    tensors = read_header(Path(path)).tensors.values()
    return dict(Counter(tensor.kind for tensor in tensors if len(tensor.shape) == 2))
