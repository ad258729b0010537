"""The description of a model that the kernels can run; other models are refused with the reason."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from cats.decode.rotary import LengthRule
from cats.errors import UnsupportedModelError
from cats.model import Decoder, DecoderLayer, Linear, describe_decoder
from cats.protocols import CausalModel
from cats.weights import Dense, InputMask, Packed, Quantised

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# The matrices of a layer.
LayerSpec = DecoderLayer

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec(Decoder):
    """A decoder whose matrices the kernels read.

    Attributes:
        length_rule: How rotary frequencies depend on the length; None where they do not.
    """

    length_rule: LengthRule | None

    def detached(self) -> ModelSpec:
        """A copy over tensors of its own, in the memory of the weights.

        It keeps this memory alive when the model's parameters get other memory.
        """
        return _detached(self)


def read_spec(model: nn.Module, *, any_mask: bool = False) -> ModelSpec:
    """The specification that modules and configuration suggest; a probe must confirm it.

    Args:
        model: A decoder.
        any_mask: Whether the kernels also compare ``up`` or products with thresholds.

    Raises:
        UnsupportedModelError: If the kernels cannot run a part of the model.
    """
    rule = LengthRule.of(cast(CausalModel, model).config.get_text_config(decoder=True))
    if rule is not None and rule.kind != "longrope":
        raise UnsupportedModelError("its rotary frequencies change with each length")
    decoder = describe_decoder(model)
    for index, layer in enumerate(decoder.layers):
        matrices = {name: getattr(layer, name) for name in ("q", "k", "v", "o")}
        for name, matrix in (matrices | {"gate": layer.mlp.gate, "up": layer.mlp.up}).items():
            _check_rows(matrix, f"{name} of layer {index}")
            if isinstance(matrix.layer, InputMask):
                raise UnsupportedModelError(
                    f"{name} of layer {index} drops small inputs, which no kernel here does"
                )
        _check_storage(layer.mlp.down, f"down of layer {index}")
        on_gate = layer.mlp.router == "gate" and layer.mlp.product_thresholds is None
        if not on_gate and not any_mask:
            raise UnsupportedModelError(
                f"thresholds of layer {index} are on up or on products, expected them on the gate"
            )
        if layer.mlp.down.bias is not None:
            raise UnsupportedModelError(f"down of layer {index} has a bias")
    _check_rows(decoder.head, "the head")
    kinds = {(p.dtype, p.device) for p in decoder.base.parameters()}
    if len(kinds) != 1:
        raise UnsupportedModelError("its weights have several dtypes or devices")
    if (dtype := kinds.pop()[0]) not in _DTYPES:
        raise UnsupportedModelError(f"no kernel takes weights in {dtype}")
    return ModelSpec(
        **{field.name: getattr(decoder, field.name) for field in fields(decoder)}, length_rule=rule
    )


def with_plain_embedding(spec: ModelSpec) -> ModelSpec:
    """The same model with its embedding in ordinary numbers, a copy where it is in codes."""
    if isinstance(spec.embedding.matrix, Dense):
        return spec
    numbers = Dense(spec.embedding.matrix.dequantised())
    return replace(spec, embedding=replace(spec.embedding, matrix=numbers))


def _check_storage(linear: Linear, name: str) -> None:
    if not isinstance(linear.matrix, Dense | Packed | Quantised):
        raise UnsupportedModelError(
            f"{name} is {linear.matrix!r}, expected ordinary weights of an nn.Linear, or quantised "
            "ones that cats.from_pretrained has read (merge adapters first)"
        )


def _check_rows(linear: Linear, name: str) -> None:
    _check_storage(linear, name)
    if linear.matrix.order != "rows":
        raise UnsupportedModelError(f"the weight of {name} is not row-major")


def _detached(value: T) -> T:
    result: object = value
    if isinstance(value, Tensor):
        result = value.detach()
    elif isinstance(value, Dense):
        result = value.detached()
    elif isinstance(value, list):
        result = [_detached(item) for item in value]
    elif is_dataclass(value) and not isinstance(value, type):
        result = replace(
            value, **{f.name: _detached(getattr(value, f.name)) for f in fields(value)}
        )
    return cast(T, result)
