"""``norm_rows.cu``: its arguments and its launch."""

from functools import cache

import torch
from torch import Tensor

from cats.errors import UnsupportedModelError
from cats.ops.cuda.arguments import Arguments, Pointer, address
from cats.ops.cuda.device import DTYPES, VECTOR_BYTES
from cats.ops.cuda.function import Function, Launch
from cats.ops.cuda.residual import Residual

__all__ = ["NormRowsArguments", "launch"]

# Vectors of 16 bytes per thread: few, so that all reads of a thread are on their way at once.
_VECTORS = 2
_MAX_WARPS = 16
_MAX_VECTORS = 4


class NormRowsArguments(Arguments):
    """``struct Arguments`` of the source."""

    __slots__ = ()
    _fields_ = (("residual", Residual), ("out", Pointer))


def launch(x: Residual, out: Tensor, *, traced: bool = False) -> Launch:
    """``out = norm(base + norm(delta))`` for each row; the sum is kept where ``x`` says so.

    Args:
        x: ``base``, ``delta`` and ``sum`` are ``[rows, D]``, float32, contiguous; the weights are
            in the dtype of ``out``.
        out: ``[rows, D]``, contiguous.
        traced: Whether warps write times.

    Raises:
        UnsupportedModelError: If rows are too long, or not a multiple of 16 bytes.
    """
    rows, width = out.shape
    function = _function(out.get_device(), width, out.dtype, traced)
    return Launch(function, NormRowsArguments(residual=x, out=address(out)), rows)


@cache
def _function(device: int, width: int, dtype: torch.dtype, traced: bool) -> Function:
    vectors, left = divmod(width * dtype.itemsize, VECTOR_BYTES)
    if left or vectors > _MAX_VECTORS * 32 * _MAX_WARPS:
        raise UnsupportedModelError(
            f"rows of {width} columns: expected a multiple of {VECTOR_BYTES} bytes, and at most "
            f"{_MAX_VECTORS * 32 * _MAX_WARPS} times as many"
        )
    warps = min(_MAX_WARPS, -(-vectors // (32 * _VECTORS)))
    defines = dict(DTYPE=DTYPES[dtype], WIDTH=width, WARPS=warps, TRACE=int(traced))
    return Function(device, "rms_norm/norm_rows.cu", defines, threads=32 * warps, shared_bytes=0)
