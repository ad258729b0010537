"""``embedding_rows.cu``: its arguments and its launch."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from cats.ops.cuda.arguments import Arguments, Pointer, address
from cats.ops.cuda.device import DTYPES
from cats.ops.cuda.function import Function, Launch

__all__ = ["EmbeddingRowsArguments", "launch"]

_BLOCKS = 4
_WARPS = 8


class EmbeddingRowsArguments(Arguments):
    """``struct Arguments`` of the source."""

    __slots__ = ()
    _fields_ = (
        ("table", Pointer),
        ("tokens", Pointer),
        ("lines", Pointer),
        ("active", Pointer),
        ("residual", Pointer),
        ("scale", ctypes.c_float),
    )


def launch(
    *,
    table: Tensor,
    tokens: Tensor,
    lines: Tensor,
    active: Tensor,
    residual: Tensor,
    scale: float,
    traced: bool = False,
) -> Launch:
    """Write the embedding of each row's newest token into its residual stream.

    Args:
        table: ``[V, D]``.
        tokens: int64, the newest token of each line.
        lines: ``[rows]``, int64: the line of each row.
        active: ``[rows]``, int32: rows with 0 get zeros.
        residual: ``[rows, D]``, float32, contiguous.
        scale: Multiplies the embeddings.
        traced: Whether warps write times.
    """
    arguments = EmbeddingRowsArguments(
        table=address(table),
        tokens=address(tokens, 8),
        lines=address(lines, 8),
        active=address(active, 4),
        residual=address(residual),
        scale=scale,
    )
    function = _function(table.get_device(), table.shape[1], table.dtype, traced)
    return Launch(function, arguments, _BLOCKS, len(residual))


@cache
def _function(device: int, width: int, dtype: torch.dtype, traced: bool) -> Function:
    defines = dict(DTYPE=DTYPES[dtype], WIDTH=width, TRACE=int(traced))
    source = "embedding/embedding_rows.cu"
    return Function(device, source, defines, threads=32 * _WARPS, shared_bytes=0)
