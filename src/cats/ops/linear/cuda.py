"""``linear.cu``: its arguments, its launch, and how rows are cut into parts."""

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from cats.errors import UnsupportedModelError
from cats.ops.cuda.arguments import Arguments, Pointer, address
from cats.ops.cuda.device import DTYPES, VECTOR_BYTES, shared_memory
from cats.ops.cuda.function import Function, Launch
from cats.ops.cuda.residual import Residual

__all__ = ["LinearArguments", "launch"]

_MATRICES = 3  # per launch: those of queries, keys and values
_WARPS = 8
# Largest part of a row. Each warp has several parts in flight.
_PART_BYTES = 8192
_MIN_STAGES, _MAX_STAGES = 3, 8
# What a multiprocessor requests while the previous kernel still runs: about enough to keep the
# memory busy. More would delay what that kernel still reads and adds, and then the input.
_EARLY_BYTES = 32 * 1024
# Shared memory that the rings leave to a block of attention on the same multiprocessor, and to the
# system.
_SPARE_BYTES = 24 * 1024


class LinearArguments(Arguments):
    """``struct Arguments`` of the source."""

    __slots__ = ()
    _fields_ = (
        ("residual", Residual),
        ("x", Pointer),
        ("weights", Pointer * _MATRICES),
        ("biases", Pointer * _MATRICES),
        ("add", Pointer),
        ("out", Pointer),
        ("copy", Pointer),
        ("ends", ctypes.c_int * _MATRICES),
        ("request_early", ctypes.c_int),
    )


def launch(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    x: Tensor | Residual,
    out: Tensor,
    add: Tensor | None = None,
    copy: Tensor | None = None,
    early: bool = True,
    multiprocessors: int,
    traced: bool = False,
) -> Launch:
    """``out = add + concatenated(weight @ x + bias)`` for up to three matrices.

    Args:
        weights: ``[rows, D]`` each, row-major.
        biases: ``[rows]`` or None, one per weight.
        x: ``[D]`` in the dtype of the weights, or the norm of a residual stream.
        out: ``[all rows]``, float32.
        add: The same shape and dtype.
        copy: The same shape and dtype; also gets the output, or 0 where there is no ``add``.
        early: Whether weights may be requested before the previous kernel has ended.
        multiprocessors: How many the GPU has.
        traced: Whether warps write times.

    Raises:
        UnsupportedModelError: If a row is too long, or not a multiple of 16 bytes.
    """
    ends = list(accumulate(len(weight) for weight in weights))
    ends += ends[-1:] * (_MATRICES - len(ends))
    arguments = LinearArguments(
        weights=tuple(address(weight) for weight in weights),
        biases=tuple(address(bias, 1) for bias in biases),
        add=address(add),
        out=address(out),
        copy=address(copy),
        ends=tuple(ends),
        request_early=early,
    )
    normed = isinstance(x, Residual)
    if isinstance(x, Residual):
        arguments.residual = x
    else:
        arguments.x = address(x)
    device, width = weights[0].get_device(), weights[0].shape[1]
    function = _function(device, width, weights[0].dtype, normed, traced)
    return Launch(function, arguments, min(multiprocessors, ends[-1]))


@cache
def _function(device: int, width: int, dtype: torch.dtype, normed: bool, traced: bool) -> Function:
    row = width * dtype.itemsize
    if row % VECTOR_BYTES:
        raise UnsupportedModelError(
            f"rows must be a multiple of {VECTOR_BYTES} bytes, {width} columns have {row}"
        )
    ring_bytes = (shared_memory(device) - row - _SPARE_BYTES) // _WARPS
    max_part = min(_PART_BYTES, ring_bytes // _MIN_STAGES)
    if max_part < 32 * VECTOR_BYTES:
        raise UnsupportedModelError(f"rows of {row} bytes are too long for the shared memory")
    parts = math.ceil(row / max_part)
    part = math.ceil(row / VECTOR_BYTES / parts) * VECTOR_BYTES
    parts = math.ceil(row / part)  # fewer where rounding up left the last ones empty
    stages = min(_MAX_STAGES, ring_bytes // part)
    defines = dict(
        DTYPE=DTYPES[dtype],
        WIDTH=width,
        NORMED=int(normed),
        WARPS=_WARPS,
        STAGES=stages,
        PARTS=parts,
        EARLY_PARTS=max(1, _EARLY_BYTES // part),
        TRACE=int(traced),
    )
    # parts, x, barriers, slots, and what alignment may add
    shared = _WARPS * stages * (part + 8) + row + 4 * _WARPS + 256
    threads = 32 * (_WARPS + 1)
    return Function(device, "linear/linear.cu", defines, threads=threads, shared_bytes=shared)
