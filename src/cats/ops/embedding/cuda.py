"""``embedding.cu``: its arguments and its launch."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from cats.ops.cuda.arguments import Arguments, Pointer, address
from cats.ops.cuda.device import DTYPES
from cats.ops.cuda.function import Function, Launch

__all__ = ["EmbeddingArguments", "launch"]

_BLOCKS = 4
_WARPS = 8


class EmbeddingArguments(Arguments):
    """``struct Arguments`` of the source."""

    __slots__ = ()
    _fields_ = (
        ("table", Pointer),
        ("token", Pointer),
        ("residual", Pointer),
        ("counters", Pointer),
        ("count", ctypes.c_int),
        ("scale", ctypes.c_float),
    )


def launch(
    *,
    table: Tensor,
    token: Tensor,
    residual: Tensor,
    counters: Tensor,
    scale: float,
    traced: bool = False,
) -> Launch:
    """Write a row of the table into the residual stream, and zeros into counters.

    Args:
        table: ``[V, D]``.
        token: One int64, the number of the row.
        residual: ``[D]``, float32.
        counters: int32, any number.
        scale: Multiplies the row.
        traced: Whether warps write times.
    """
    arguments = EmbeddingArguments(
        table=address(table),
        token=address(token),
        residual=address(residual),
        counters=address(counters),
        count=counters.numel(),
        scale=scale,
    )
    function = _function(table.get_device(), table.shape[1], table.dtype, traced)
    return Launch(function, arguments, _BLOCKS)


@cache
def _function(device: int, width: int, dtype: torch.dtype, traced: bool) -> Function:
    defines = dict(DTYPE=DTYPES[dtype], WIDTH=width, TRACE=int(traced))
    return Function(device, "embedding/embedding.cu", defines, threads=32 * _WARPS, shared_bytes=0)
