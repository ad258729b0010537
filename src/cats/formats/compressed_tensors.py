"""compressed-tensors, as llm-compressor writes it: pack-, int- and float-quantized.

Codes are signed. ``weight_packed`` has int32 words of consecutive columns, each code plus 8 or 128;
``weight`` has int8 or float8 numbers. A scale belongs to a group of columns, a row, a block of rows
and columns, or the whole matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cats.errors import FormatError
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
from cats.weights.quantised import FLOAT8, packed, unpacked

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
# Scales of activations: the weights do not depend on them.
_ACTIVATIONS = frozenset(
    f"{which}_{what}" for which in ("input", "output") for what in ("scale", "zero_point")
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scheme:
    """How the layers of some targets are quantised."""

    targets: tuple[str, ...]
    bits: int
    is_float: bool
    is_symmetric: bool
    strategy: str
    group_size: int
    block: tuple[int, int]


class CompressedTensors(Format):
    name = "compressed-tensors"
    parts = frozenset(
        {"weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape"}
        | {"weight_g_idx"}
        | _ACTIVATIONS
    )
    kept = frozenset({"weight_shape", "weight_g_idx"} | _ACTIVATIONS)

    def __init__(self, config: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: If a group is quantised in another way; the message says which.
        """
        formats = {config.get("format", "dense")}
        for name in ("kv_cache_scheme", "transform_config"):
            if config.get(name):
                raise ValueError(f"a {name}")
        if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
            raise ValueError("a sparsity_config")
        self.schemes = []
        for group in (config.get("config_groups") or {}).values():
            if group.get("weights") is None:
                raise ValueError("activations only")
            self.schemes.append(_scheme(group["weights"], group.get("targets") or ()))
            if group.get("format"):
                formats.add(group["format"])
        formats.discard("mixed-precision")
        if unknown := [*formats - {*_FORMATS}]:
            raise ValueError(f"the format {unknown[0]}")
        if not self.schemes:
            raise ValueError("no config_groups")

    def markers(self) -> frozenset[str]:
        return frozenset({"weight_scale"})

    def read(self, layer: Layer) -> Quantised:
        scheme = self._scheme_of(layer.name)
        bits, columns, zero = scheme.bits, layer.columns, 2 ** (scheme.bits - 1)
        if "weight_packed" in layer.tensors:
            width = -(-columns * bits // 32)
            words = layer.take("weight_packed", (layer.rows, width), [torch.int32])
            shape = layer.take("weight_shape", (2,), [torch.int32, torch.int64])
            if not shape.is_meta and shape.tolist() != [layer.rows, columns]:
                raise layer.error(
                    f"has the weight_shape {shape.tolist()}, expected {[layer.rows, columns]}"
                )
            codes = bytes_of(words)[:, : -(-columns * bits // 8)].contiguous()
        elif scheme.is_float:
            codes, zero = layer.take("weight", (layer.rows, columns), [FLOAT8]), 0
        else:
            numbers = layer.take("weight", (layer.rows, columns), [torch.int8])
            codes = _biased(layer, numbers, bits)
            codes = packed(codes) if bits == 4 else codes
        group_size = scheme.group_size if scheme.strategy == "group" else columns
        if scheme.strategy == "block":
            group_size = scheme.block[1]
        scales = self._spread(layer, scheme, "weight_scale", FLOATS)
        zeros = None
        if not scheme.is_symmetric:
            if "weight_packed" in layer.tensors and scheme.strategy in ("group", "channel"):
                height = -(-layer.rows * bits // 32)
                words = layer.take("weight_zero_point", (height, scales.shape[1]), [torch.int32])
                points = one_by_one(words.t(), bits)[:, : layer.rows].t()
            else:
                stored = self._spread(layer, scheme, "weight_zero_point", [torch.int8])
                points = _biased(layer, stored, bits)
            zeros, zero = constant(points)
        order = None
        if "weight_g_idx" in layer.tensors:
            of_columns = layer.take("weight_g_idx", (columns,), [torch.int32, torch.int64])
            # the library writes -1 where there is no order
            if of_columns.is_meta or not bool((of_columns == -1).all()):
                codes, order = sort_columns(layer, codes, bits, group_size, of_columns)
        return Quantised(
            codes=codes,
            scales=scales,
            bits=bits,
            columns=columns,
            group_size=min(group_size, columns),
            zeros=zeros,
            zero=zero,
            column_order=order,
            arithmetic=scales.dtype,
            dtype=layer.dtype,
        )

    def write(self, name: str, weight: Quantised, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        codes, bits = codes_in_place(weight), weight.bits
        tensors = {part: tensor for part, tensor in like.items() if part in self.kept}
        if "weight_packed" in like:
            tensors["weight_packed"] = words_of(codes)
        elif codes.dtype == FLOAT8:
            tensors["weight"] = codes
        else:
            tensors["weight"] = _signed(unpacked(codes, bits, weight.columns), bits)
        scheme = self._scheme_of(name)
        high = scheme.block[0] if scheme.strategy == "block" else 1
        tensors["weight_scale"] = _gathered(weight.scales, like["weight_scale"], high)
        if (stored := like.get("weight_zero_point")) is not None:
            zeros = zeros_of(weight)
            if stored.dtype == torch.int32:
                tensors["weight_zero_point"] = in_words(zeros.t(), bits).t().contiguous()
            else:
                tensors["weight_zero_point"] = _gathered(_signed(zeros, bits), stored, high)
        return tensors

    def _scheme_of(self, name: str) -> _Scheme:
        by_name = [s for s in self.schemes if _matches(name, s.targets)]
        found = by_name or [s for s in self.schemes if "Linear" in s.targets]
        if not found:
            raise FormatError(
                f"{name} is quantised, but no group of the quantization_config targets it"
            )
        return found[0]

    def _spread(
        self, layer: Layer, scheme: _Scheme, part: str, dtypes: Iterable[torch.dtype]
    ) -> Tensor:
        """Scales or zero points, one for each row and group."""
        rows, columns = layer.rows, layer.columns
        if scheme.strategy == "group":
            if columns % scheme.group_size:
                raise layer.error(
                    f"has {columns} columns, which are no whole groups of {scheme.group_size}"
                )
            return layer.take(part, (rows, columns // scheme.group_size), dtypes)
        if scheme.strategy == "block":
            high, wide = scheme.block
            shape = (-(-rows // high), -(-columns // wide))
            blocks = layer.take(part, shape, dtypes)
            return blocks.repeat_interleave(high, 0)[:rows].contiguous()
        ndim = layer.tensors[part].ndim if part in layer.tensors else 1
        if scheme.strategy == "tensor":
            one = layer.take(part, (1,) * ndim, dtypes)
            return one.reshape(1, 1).expand(rows, 1).contiguous()
        return layer.take(part, (rows, 1)[: max(ndim, 1)], dtypes).reshape(rows, 1)


def _scheme(weights: Mapping[str, Any], targets: Iterable[str]) -> _Scheme:
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)):
        raise ValueError(f"{kind}{bits} weights")
    if strategy not in ("group", "channel", "tensor", "block"):
        raise ValueError(f"the strategy {strategy}")
    if weights.get("dynamic"):
        raise ValueError("dynamic weights")
    is_symmetric = bool(weights.get("symmetric", True))
    if kind == "float" and not is_symmetric:
        raise ValueError("float8 weights with zero points")
    group_size, block = weights.get("group_size") or 0, weights.get("block_structure") or (0, 0)
    if strategy == "group" and not group_size > 0:
        raise ValueError(f"groups of {group_size}")
    if strategy == "block" and not (len(block) == 2 and min(block) > 0):
        raise ValueError(f"blocks of {block}")
    return _Scheme(
        targets=tuple(targets),
        bits=int(bits or 0),
        is_float=kind == "float",
        is_symmetric=is_symmetric,
        strategy=strategy,
        group_size=group_size,
        block=(block[0], block[1]),
    )


def _matches(name: str, targets: Iterable[str]) -> bool:
    return any(
        re.match(target[3:], name) is not None if target.startswith("re:") else name == target
        for target in targets
    )


def _biased(layer: Layer, numbers: Tensor, bits: int) -> Tensor:
    """Signed numbers as codes, one in each byte."""
    bias = 2 ** (bits - 1)
    if bits == 4 and not numbers.is_meta and numbers.numel():
        low, high = (int(n) for n in torch.aminmax(numbers))
        if low < -bias or high >= bias:
            raise layer.error(f"has codes {low} to {high}, expected {-bias} to {bias - 1}")
    # the addition wraps at 256
    codes: Tensor = numbers.contiguous().view(torch.uint8) + bias
    return codes


def _signed(codes: Tensor, bits: int) -> Tensor:
    numbers: Tensor = (codes - 2 ** (bits - 1)).view(torch.int8)
    return numbers


def _gathered(numbers: Tensor, like: Tensor, high: int) -> Tensor:
    """The stored ones of numbers ``[rows, G]``: one for all, or one for each ``high`` rows."""
    if like.numel() == 1:
        return numbers[:1, :1].reshape(like.shape).contiguous()
    return numbers[::high].reshape(like.shape).contiguous()
