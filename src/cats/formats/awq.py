"""AWQ checkpoints in the layout ``gemm`` of AutoAWQ: 4 bits, groups of columns, zero points.

``qweight`` is ``[columns, rows / 8]``: a word has eight consecutive rows of one column, in the
order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest code up. ``qzeros`` ``[G, rows / 8]`` has the same
order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cats.formats.base import FLOATS, Format, Layer, constant, in_words, one_by_one, zeros_of
from cats.weights import Quantised
from cats.weights.quantised import packed, unpacked

# Which code of a word belongs to each of its eight rows, and which row to each code.
_CODE_OF_ROW = [0, 4, 1, 5, 2, 6, 3, 7]
_ROW_OF_CODE = [0, 2, 4, 6, 1, 3, 5, 7]


class AWQ(Format):
    name = "AWQ"
    parts = frozenset({"qweight", "qzeros", "scales"})

    def __init__(self, config: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: If it is another kind of AWQ; the message says which.
        """
        layout = str(config.get("version") or config.get("format") or "gemm").lower()
        if layout != "gemm":
            raise ValueError(f"the layout {layout}")
        if config.get("bits", config.get("w_bit", 4)) != 4:
            raise ValueError(f"{config.get('bits', config.get('w_bit'))} bits")
        self.group_size = int(config.get("group_size", config.get("q_group_size", 128)))

    def markers(self) -> frozenset[str]:
        return frozenset({"qweight"})

    def read(self, layer: Layer) -> Quantised:
        if layer.rows % 8:
            raise layer.error(f"has {layer.rows} rows, which do not fill the words of qweight")
        group_size = layer.columns if self.group_size <= 0 else self.group_size
        groups = -(-layer.columns // group_size)
        words = layer.take("qweight", (layer.columns, layer.rows // 8), [torch.int32])
        zeros = layer.take("qzeros", (groups, layer.rows // 8), [torch.int32])
        scales = layer.take("scales", (groups, layer.rows), FLOATS)
        zero_points, zero = constant(_rows(words=zeros).t())
        return Quantised(
            codes=packed(_rows(words=words).t()),
            scales=scales.t().contiguous(),
            bits=4,
            columns=layer.columns,
            group_size=min(group_size, layer.columns),
            zeros=zero_points,
            zero=zero,
            arithmetic=scales.dtype,
            dtype=layer.dtype,
        )

    def write(self, name: str, weight: Quantised, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            "qweight": _words(rows=unpacked(weight.codes, 4, weight.columns).t()),
            "qzeros": _words(rows=zeros_of(weight).t()),
            "scales": weight.scales.t().contiguous(),
        }


def _rows(*, words: Tensor) -> Tensor:
    codes = one_by_one(words, 4)
    rows: Tensor = codes.unflatten(1, (-1, 8))[..., _CODE_OF_ROW].flatten(1)
    return rows


def _words(*, rows: Tensor) -> Tensor:
    return in_words(rows.unflatten(1, (-1, 8))[..., _ROW_OF_CODE].flatten(1), 4)
