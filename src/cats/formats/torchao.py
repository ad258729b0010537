"""torchao's weight-only checkpoints in safetensors, as transformers saves them: int8 and int4.

The tensors of a layer are ``_weight_qdata``, ``_weight_scale`` and ``_weight_zero_point``. The
metadata of the file says which class they make, and with which group size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from cats.errors import FormatError
from cats.formats.base import FLOATS, Format, Layer, constant, zeros_of
from cats.weights import Quantised
from cats.weights.quantised import packed, unpacked

_CONFIGS = ("Int8WeightOnlyConfig", "Int4WeightOnlyConfig", "IntxWeightOnlyConfig")
_PLAIN = json.dumps({"_type": "Tensor"})
_PREFIX = "_weight_"
_WEIGHT_PARTS = ("qdata", "scale", "zero_point", "scale_and_zero")
# Named, so that layers that quantise activations are refused with the reason.
_ACTIVATION_PARTS = ("act_pre_scale", "act_quant_scale", "act_quant_zero_point")


class TorchAO(Format):
    name = "torchao"
    parts = frozenset(_PREFIX + part for part in (*_WEIGHT_PARTS, *_ACTIVATION_PARTS))

    def __init__(self, config: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: If it is another kind of quantisation; the message says which.
        """
        kinds = config.get("quant_type")
        default = kinds.get("default", kinds) if isinstance(kinds, Mapping) else kinds
        kind = default.get("_type") if isinstance(default, Mapping) else default
        if kind not in _CONFIGS:
            raise ValueError(f"the type {kind}")
        self._metadata: dict[str, str] = {}

    def markers(self) -> frozenset[str]:
        return frozenset({_PREFIX + "qdata"})

    def read_metadata(self, metadata: Mapping[str, str]) -> None:
        self._metadata.update({k: v for k, v in metadata.items() if k != "format"})

    def metadata(self, names: Iterable[str]) -> dict[str, str]:
        entries = dict(self._metadata)
        for name in names:
            if name.rpartition(".")[2] not in self.parts:
                entries.setdefault(name, _PLAIN)
        entries["tensor_names"] = json.dumps([name for name in entries if "." in name])
        return entries

    def read(self, layer: Layer) -> Quantised:
        kind, fields = self._entry(layer.name)
        if foreign := [part for part in layer.tensors if "_act_" in part]:
            raise layer.error(f"has {foreign[0]}: only weights are read, not scales of activations")
        readers = {
            "Int8Tensor": _int8,
            "IntxUnpackedToInt8Tensor": _intx,
            "Int4Tensor": _int4,
        }
        if kind not in readers:
            raise layer.error(
                f"is a {kind}, which is not read: quantise it again with Int8WeightOnlyConfig, "
                "IntxWeightOnlyConfig, or Int4WeightOnlyConfig with int4_packing_format='plain'"
            )
        try:
            return readers[kind](layer, fields)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, FormatError):
                raise
            raise layer.error(f"has damaged metadata ({error!r})") from error

    def write(self, name: str, weight: Quantised, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kind, _ = self._entry(name)
        scale = like[_PREFIX + "scale"]
        zero = like.get(_PREFIX + "zero_point")
        if kind == "Int4Tensor":
            assert weight.shifts is not None
            data = (weight.codes ^ 0x88).view(like[_PREFIX + "qdata"].dtype)
            return {
                _PREFIX + "qdata": data,
                _PREFIX + "scale": weight.scales.t().contiguous(),
                _PREFIX + "zero_point": weight.shifts.t().contiguous(),
            }
        bias = 2 ** (weight.bits - 1)
        codes = unpacked(weight.codes, weight.bits, weight.columns)
        tensors = {
            _PREFIX + "qdata": (codes - bias).view(torch.int8),
            _PREFIX + "scale": weight.scales[: scale.shape[0]].contiguous(),
        }
        if zero is not None:
            zeros = (zeros_of(weight) - bias).view(torch.int8)
            tensors[_PREFIX + "zero_point"] = zeros[: zero.shape[0]].contiguous()
        return tensors

    def _entry(self, name: str) -> tuple[str, Mapping[str, Any]]:
        """The class of the weight of a layer, and those of its fields that are not tensors."""
        try:
            entry = json.loads(self._metadata[f"{name}.weight"])
            return entry["_type"], entry["_data"]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise FormatError(
                f"{name} has no metadata of torchao in the safetensors file: the checkpoint is "
                "incomplete"
            ) from error


def _int8(layer: Layer, fields: Mapping[str, Any]) -> Quantised:
    return _signed(layer, fields, bits=8)


def _intx(layer: Layer, fields: Mapping[str, Any]) -> Quantised:
    if fields["activation_quantization"] is not None:
        raise layer.error("quantises activations, and only weights are read")
    # fewer than 8 bits are stored as int8 numbers; those of 4 are packed here
    return _signed(layer, fields, bits=4 if _dtype(fields["target_dtype"]) == "int4" else 8)


def _signed(layer: Layer, fields: Mapping[str, Any], bits: int) -> Quantised:
    high, group_size = (int(size) for size in fields["block_size"])
    if high not in (1, layer.rows) or group_size < 1 or layer.columns % group_size:
        raise layer.error(f"has blocks of {[high, group_size]}, expected groups of whole rows")
    numbers = layer.take(_PREFIX + "qdata", (layer.rows, layer.columns), [torch.int8])
    shape = (layer.rows // high, layer.columns // group_size)
    scales = layer.take(_PREFIX + "scale", shape, FLOATS).expand(layer.rows, -1).contiguous()
    bias = 2 ** (bits - 1)
    zeros, zero = None, bias
    if _PREFIX + "zero_point" in layer.tensors:
        points = layer.take(_PREFIX + "zero_point", shape, [torch.int8])
        zeros, zero = constant(_codes(layer, points.expand(layer.rows, -1), bits))
    codes = _codes(layer, numbers, bits)
    result = getattr(torch, _dtype(fields["dtype"]))
    return Quantised(
        codes=packed(codes) if bits == 4 else codes,
        scales=scales,
        bits=bits,
        columns=layer.columns,
        group_size=group_size,
        zeros=zeros,
        zero=zero,
        # the codes have the dtype of the result, and a product that of both factors
        arithmetic=torch.promote_types(scales.dtype, result),
        dtype=layer.dtype,
    )


def _int4(layer: Layer, fields: Mapping[str, Any]) -> Quantised:
    high, group_size = (int(size) for size in fields["block_size"])
    if high != 1 or group_size < 1 or layer.columns % group_size or layer.columns % 2:
        raise layer.error(f"has blocks of {[high, group_size]} for {layer.columns} columns")
    width = layer.columns // 2
    pairs = layer.take(_PREFIX + "qdata", (layer.rows, width), [torch.int8, torch.uint8])
    shape = (layer.columns // group_size, layer.rows)
    scales = layer.take(_PREFIX + "scale", shape, FLOATS)
    shifts = layer.take(_PREFIX + "zero_point", shape, [scales.dtype])
    return Quantised(
        # signed codes of four bits become unsigned: plus 8
        codes=pairs.view(torch.uint8) ^ 0x88,
        scales=scales.t().contiguous(),
        bits=4,
        columns=layer.columns,
        group_size=group_size,
        zero=8,
        shifts=shifts.t().contiguous(),
        dtype=layer.dtype,
    )


def _codes(layer: Layer, numbers: Tensor, bits: int) -> Tensor:
    bias = 2 ** (bits - 1)
    if bits == 4 and not numbers.is_meta and numbers.numel():
        low, high = (int(n) for n in torch.aminmax(numbers))
        if low < -bias or high >= bias:
            raise layer.error(f"has codes {low} to {high}, expected {-bias} to {bias - 1}")
    codes: Tensor = numbers.contiguous().view(torch.uint8) + bias
    return codes


def _dtype(entry: Any) -> str:
    name = entry["_data"] if isinstance(entry, Mapping) else entry
    return str(name).removeprefix("torch.")
