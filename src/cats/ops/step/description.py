"""The structs of ``description.h``: what a token of one conversation consists of."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from cats.errors import ShapeError
from cats.ops.quantised import PackedColumns, PackedRows

__all__ = ["StepColumns", "StepLayer", "StepMatrix", "StepModel", "address", "columns", "matrix"]

_Pointer = ctypes.c_void_p
_Integer = ctypes.c_int64
_Real = ctypes.c_double


class _Struct(ctypes.Structure):
    # an instance with a dictionary would accept a wrong name
    __slots__ = ()


class StepMatrix(_Struct):
    """The rows of a linear layer: dense numbers, or packed codes."""

    __slots__ = ()
    _fields_ = (
        ("data", _Pointer),
        ("bias", _Pointer),
        *((name, _Integer) for name in ("rows", "columns", "bits")),
        *((name, _Integer) for name in ("group", "scale", "mode", "zero", "pitch")),
    )


class StepColumns(_Struct):
    """``down``, one row for each neuron: dense numbers, or packed columns."""

    __slots__ = ()
    _fields_ = (
        *((name, _Pointer) for name in ("data", "scales", "extras")),
        *((name, _Integer) for name in ("bits", "group", "scale", "mode", "zero", "pitch")),
    )


class StepLayer(_Struct):
    """A decoder layer."""

    __slots__ = ()
    _fields_ = (
        *((name, StepMatrix) for name in ("q", "k", "v", "o", "gate", "up")),
        ("down", StepColumns),
        *((name, _Pointer) for name in ("attention_norm", "attention_post_norm")),
        *((name, _Pointer) for name in ("mlp_norm", "mlp_post_norm", "q_norm", "k_norm")),
        *((name, _Pointer) for name in ("thresholds", "product_thresholds")),
        *((name, _Pointer) for name in ("cosines", "sines", "keys", "values")),
        *((name, _Integer) for name in ("activation", "gate_is_router", "window", "rotated")),
        *((name, _Real) for name in ("scale", "softcap", "epsilon", "weight_offset")),
    )


class StepModel(_Struct):
    """A model and the buffers of a conversation."""

    __slots__ = ()
    _fields_ = (
        ("layers", ctypes.POINTER(StepLayer)),
        *((name, StepMatrix) for name in ("embedding", "head")),
        *((name, _Pointer) for name in ("norm", "logits", "token", "position", "slot", "step")),
        *((name, _Pointer) for name in ("chosen", "finished", "ends")),
        *((name, _Integer) for name in ("end_count", "count", "number", "hidden", "neurons")),
        *((name, _Integer) for name in ("heads", "key_heads", "head_size", "capacity")),
        *((name, _Integer) for name in ("vocabulary", "threads")),
        *((name, _Real) for name in ("embedding_scale", "epsilon", "weight_offset")),
    )


def address(tensor: Tensor | None) -> int | None:
    """Address of the first number, or None.

    Raises:
        ShapeError: If the numbers do not follow each other.
    """
    if tensor is None:
        return None
    if not tensor.is_contiguous():
        raise ShapeError(f"expected a contiguous tensor, got strides {tensor.stride()}")
    return tensor.data_ptr()


def matrix(stored: Tensor | PackedRows, bias: Tensor | None) -> StepMatrix:
    """A linear layer ``[rows, columns]``."""
    if isinstance(stored, Tensor):
        rows, width = stored.shape
        sizes: dict[str, Any] = dict(
            data=address(stored), rows=rows, columns=width, pitch=width * stored.element_size()
        )
    else:
        bits, width, group, scale, mode, zero = stored.layout.numbers
        sizes = dict(data=address(stored.rows), rows=stored.count, columns=width, bits=bits)
        sizes |= dict(group=group, scale=scale, mode=mode, zero=zero, pitch=stored.layout.pitch)
    return StepMatrix(bias=address(bias), **sizes)


def columns(stored: Tensor | PackedColumns) -> StepColumns:
    """``down`` ``[outputs, neurons]``, column by column."""
    if isinstance(stored, Tensor):
        pitch = stored.shape[0] * stored.element_size()
        return StepColumns(data=address(stored.t()), pitch=pitch)
    bits, _, group, scale, mode, zero = stored.layout.numbers
    return StepColumns(
        data=address(stored.columns),
        scales=address(stored.scales),
        extras=address(stored.extras),
        bits=bits,
        group=group,
        scale=scale,
        mode=mode,
        zero=zero,
        pitch=stored.layout.pitch,
    )
