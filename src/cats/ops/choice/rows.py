"""``choose_rows.cu``: its arguments and its launch."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from cats.ops.cuda.arguments import Arguments, Pointer, address
from cats.ops.cuda.device import DTYPES
from cats.ops.cuda.function import Function, Launch

__all__ = ["BLOCKS", "ChoiceRowsArguments", "launch"]

BLOCKS = 32
"""Blocks per row, each with its own best value."""
_WARPS = 8


class ChoiceRowsArguments(Arguments):
    """``struct Arguments`` of the source."""

    __slots__ = ()
    _fields_ = (
        ("logits", Pointer),
        ("values", Pointer),
        ("indices", Pointer),
        ("arrived", Pointer),
        ("rows_ended", Pointer),
        ("lines", Pointer),
        ("active", Pointer),
        ("positions", Pointer),
        ("tokens", Pointer),
        ("step", Pointer),
        ("chosen", Pointer),
        ("steps", ctypes.c_int),
        ("stride", ctypes.c_int),
        ("count", ctypes.c_int),
        ("softcap", ctypes.c_float),
    )


def launch(
    *,
    logits: Tensor,
    best: Tensor,
    arrived: Tensor,
    lines: Tensor,
    active: Tensor,
    positions: Tensor,
    tokens: Tensor,
    step: Tensor,
    chosen: Tensor,
    softcap: float,
    traced: bool = False,
) -> Launch:
    """Choose the likeliest token of each row, and move on to the next position.

    Args:
        logits: ``[rows, V]``, float32, contiguous.
        best: ``[2, rows * BLOCKS or more]``, float32, scratch memory.
        arrived: ``[rows + 1 or more]``, int32 zeros, which are zero again afterwards.
        lines: ``[rows]``, int64: the line of each row.
        active: ``[rows]``, int32: 0 where a row is not used. Nothing is written for it.
        positions: ``[rows]``, int64, get 1 more.
        tokens: int64, the newest token of each line; gets the choices.
        step: One int64: ``chosen[step % steps]`` gets the choices. Gets 1 more.
        chosen: ``[steps, rows or more]``, int64, contiguous along the rows.
        softcap: Bound of the logits, 0 for none.
        traced: Whether warps write times.
    """
    rows, count = logits.shape
    values, indices = best
    assert values.numel() >= rows * BLOCKS
    arguments = ChoiceRowsArguments(
        logits=address(logits, 4),
        values=address(values, 4),
        indices=address(indices, 4),
        arrived=address(arrived, 4),
        rows_ended=address(arrived[rows:], 4),
        lines=address(lines, 8),
        active=address(active, 4),
        positions=address(positions, 8),
        tokens=address(tokens, 8),
        step=address(step, 8),
        chosen=address(chosen, 8),
        steps=len(chosen),
        stride=chosen.stride(0),
        count=count,
        softcap=softcap,
    )
    return Launch(_function(logits.get_device(), traced), arguments, BLOCKS, rows)


@cache
def _function(device: int, traced: bool) -> Function:
    defines = dict(DTYPE=DTYPES[torch.float32], TRACE=int(traced))
    return Function(device, "choice/choose_rows.cu", defines, threads=32 * _WARPS, shared_bytes=0)
