"""``choose.cu``: its arguments and its launch."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from cats.ops.cuda.arguments import Arguments, Pointer, address
from cats.ops.cuda.device import DTYPES
from cats.ops.cuda.function import Function, Launch

__all__ = ["BLOCKS", "ChoiceArguments", "launch"]

BLOCKS = 64
"""Blocks per launch, each with its own best value."""
_WARPS = 8


class ChoiceArguments(Arguments):
    """``struct Arguments`` of the source."""

    __slots__ = ()
    _fields_ = (
        ("logits", Pointer),
        ("values", Pointer),
        ("indices", Pointer),
        ("arrived", Pointer),
        ("token", Pointer),
        ("position", Pointer),
        ("slot", Pointer),
        ("step", Pointer),
        ("finished", Pointer),
        ("ends", Pointer),
        ("chosen", Pointer),
        ("padding", ctypes.c_int64),
        ("count", ctypes.c_int),
        ("end_count", ctypes.c_int),
        ("softcap", ctypes.c_float),
    )


def launch(
    *,
    logits: Tensor,
    best: Tensor,
    arrived: Tensor,
    token: Tensor,
    position: Tensor,
    slot: Tensor,
    step: Tensor,
    finished: Tensor,
    ends: Tensor,
    chosen: Tensor,
    padding: int,
    softcap: float,
    traced: bool = False,
) -> Launch:
    """Choose the likeliest token, and move on to the next position.

    Args:
        logits: ``[V]``, float32.
        best: ``[2, BLOCKS]``, scratch memory.
        arrived: One int32 zero, which is zero again afterwards.
        token: One int64, gets the choice.
        position: One int64, gets 1 more.
        slot: One int64, gets 1 more.
        step: One int64, which line of ``chosen`` gets the choice; gets 1 more.
        finished: One bool: whether the row has ended.
        ends: int64, the tokens that end a row.
        chosen: ``[steps, 1]``, int64: the choice of each step.
        padding: The token of a row that has ended.
        softcap: Bound of the logits, 0 for none.
        traced: Whether warps write times.
    """
    values, indices = best
    arguments = ChoiceArguments(
        logits=address(logits),
        values=address(values),
        indices=address(indices),
        arrived=address(arrived),
        token=address(token),
        position=address(position),
        slot=address(slot),
        step=address(step),
        finished=address(finished),
        ends=address(ends),
        chosen=address(chosen),
        padding=padding,
        count=len(logits),
        end_count=len(ends),
        softcap=softcap,
    )
    return Launch(_function(logits.get_device(), traced), arguments, BLOCKS)


@cache
def _function(device: int, traced: bool) -> Function:
    defines = dict(DTYPE=DTYPES[torch.float32], TRACE=int(traced))
    return Function(device, "choice/choose.cu", defines, threads=32 * _WARPS, shared_bytes=0)
