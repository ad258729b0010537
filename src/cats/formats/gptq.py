"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them: 4 and 8 bits, with and without act-order.

Codes lie column by column: an int32 word of ``qweight`` ``[columns * bits / 32, rows]`` has
consecutive columns of one row. Version 1 stores zero points minus 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cats.formats.base import (
    FLOATS,
    Format,
    Layer,
    bytes_of,
    codes_in_place,
    constant,
    in_words,
    one_by_one,
    sort_columns,
    words_of,
    zeros_of,
)
from cats.weights import Quantised

# A one in each code of a word. As in GPTQModel, it is added to whole words: a sum that is too large
# for its code carries into the next one.
_ONES = {4: 0x11111111, 8: 0x01010101}


class GPTQ(Format):
    name = "GPTQ"
    parts = frozenset({"qweight", "qzeros", "scales", "g_idx"})
    kept = frozenset({"g_idx"})

    def __init__(self, config: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: If it is another kind of GPTQ; the message says which.
        """
        stored = config.get("checkpoint_format") or config.get("format") or "gptq"
        if stored not in ("gptq", "gptq_v2"):
            raise ValueError(f"the layout {stored}")
        if config.get("is_marlin_format"):
            raise ValueError("the layout marlin")
        if config.get("bits") not in (4, 8):
            raise ValueError(f"{config.get('bits')} bits")
        self.group_size = int(config.get("group_size", 128))
        self.is_ordered = bool(config.get("desc_act", False))
        self.is_first_version = stored == "gptq"

    def markers(self) -> frozenset[str]:
        return frozenset({"qweight"})

    def read(self, layer: Layer) -> Quantised:
        words = layer.take("qweight", (None, layer.rows), [torch.int32])
        # GPTQModel may give layers other bits than the config says
        bits = next((b for b in _ONES if words.shape[0] * 32 == layer.columns * b), None)
        if bits is None:
            raise layer.error(
                f"has {words.shape[0]} words for {layer.columns} columns, expected those of 4 or 8 "
                "bits"
            )
        if layer.rows * bits % 32:
            raise layer.error(f"has {layer.rows} rows, which do not fill the words of qzeros")
        group_size = layer.columns if self.group_size <= 0 else self.group_size
        groups = -(-layer.columns // group_size)
        scales = layer.take("scales", (groups, layer.rows), FLOATS)
        zeros = layer.take("qzeros", (groups, layer.rows * bits // 32), [torch.int32])
        if self.is_first_version:
            zeros = zeros + _ONES[bits]
        zero_points, zero = constant(one_by_one(zeros, bits).t())
        codes, order = bytes_of(words.t()), None
        if "g_idx" in layer.tensors or self.is_ordered:
            of_columns = layer.take("g_idx", (layer.columns,), [torch.int32, torch.int64])
            codes, order = sort_columns(layer, codes, bits, group_size, of_columns)
        return Quantised(
            codes=codes,
            scales=scales.t().contiguous(),
            bits=bits,
            columns=layer.columns,
            group_size=min(group_size, layer.columns),
            zeros=zero_points,
            zero=zero,
            column_order=order,
            arithmetic=scales.dtype,
            dtype=layer.dtype,
        )

    def write(self, name: str, weight: Quantised, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        zeros = in_words(zeros_of(weight).t(), weight.bits)
        if self.is_first_version:
            zeros = zeros - _ONES[weight.bits]
        return {
            "qweight": words_of(codes_in_place(weight)).t().contiguous(),
            "qzeros": zeros,
            "scales": weight.scales.t().contiguous(),
            **{part: tensor for part, tensor in like.items() if part in self.kept},
        }
