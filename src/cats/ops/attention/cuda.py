"""``attention.cu``: its arguments, how it is cut into blocks, and its launch."""

import ctypes
import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from cats.errors import UnsupportedModelError
from cats.ops.cuda.arguments import Arguments, Pointer, address
from cats.ops.cuda.device import DTYPES, VECTOR_BYTES
from cats.ops.cuda.function import Function, Launch

__all__ = [
    "BLOCKS_ON_A_MULTIPROCESSOR",
    "AttentionArguments",
    "Grid",
    "grid_of",
    "launch",
]

BLOCKS_ON_A_MULTIPROCESSOR = 2
"""Two, so that one reads while the other computes."""
_WARPS = 8
_MAX_QUERIES = 4  # query heads per block: more would not fit into its registers
_MAX_HEAD = 256
# Merging splits takes about as long as a block takes for this many slots: timed with 16-bit heads
# of 64 and 128. A block takes longer for the slots of wider heads.
_UNSPLIT_SLOTS = 256
_SLOTS_PER_SPLIT = 64
_MAX_SPLITS = 64


class AttentionArguments(Arguments):
    """``struct Arguments`` of the source."""

    __slots__ = ()
    _fields_ = (
        ("qkv", Pointer),
        ("cosines", Pointer),
        ("sines", Pointer),
        ("q_weight", Pointer),
        ("k_weight", Pointer),
        ("keys", Pointer),
        ("values", Pointer),
        ("out", Pointer),
        ("slot", Pointer),
        ("position", Pointer),
        ("partials", Pointer),
        ("counters", Pointer),
        ("key_heads", ctypes.c_int),
        ("capacity", ctypes.c_int),
        ("window", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("epsilon", ctypes.c_float),
        ("weight_offset", ctypes.c_float),
    )


class Grid(NamedTuple):
    """How a launch is cut into blocks."""

    splits: int
    """Blocks that share the slots of a head."""
    columns: int
    """Groups of query heads, at most one for each head."""
    heads: int
    """Query heads of a group."""


def grid_of(slots: int, heads: int, key_heads: int, multiprocessors: int) -> Grid:
    """The grid for contexts of up to ``slots``; more slots never have fewer splits.

    A block with fewer query heads is done sooner. Blocks with more read the same keys less often,
    which counts at long contexts. More than two never paid where all blocks run at once.
    """
    queries = heads // key_heads
    blocks = BLOCKS_ON_A_MULTIPROCESSOR * multiprocessors
    wanted = 1 if slots <= _UNSPLIT_SLOTS else math.ceil(slots / _SLOTS_PER_SPLIT)
    for most in range(1, _MAX_QUERIES + 1):
        parts = math.ceil(queries / most)
        # one head: also with splits of twice the slots
        fits = (
            wanted * key_heads * parts <= 2 * blocks if most == 1 else key_heads * parts <= blocks
        )
        if fits:
            break
    columns = key_heads * parts
    splits = max(1, min(wanted, blocks // columns, _MAX_SPLITS))
    return Grid(splits, columns, math.ceil(queries / parts))


def launch(
    *,
    qkv: Tensor,
    cosines: Tensor,
    sines: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    slot: Tensor,
    position: Tensor,
    partials: Tensor,
    counters: Tensor,
    heads: int,
    window: int,
    slots: int,
    scale: float,
    softcap: float,
    epsilon: float,
    weight_offset: float,
    multiprocessors: int,
    traced: bool = False,
) -> Launch:
    """Rotate the new token's queries and keys, write its keys and values, and attend.

    ``H`` is the size of a head, ``R`` how much of it is rotated.

    Args:
        qkv: ``[heads + 2 * key heads, H]``, float32.
        cosines: ``[capacity, R]``, float32.
        sines: ``[capacity, R]``, float32.
        q_norm: ``[H]``, weights of the norm of each query, or None.
        k_norm: ``[H]``, weights of the norm of each key, or None.
        keys: ``[1, key heads, capacity, H]``.
        values: ``[1, key heads, capacity, H]``.
        out: ``[heads * H]``, in the dtype of the cache.
        slot: One int64: where the new token goes.
        position: One int64: its position.
        partials: ``[splits, heads, H + 2]``, float32, scratch memory (:func:`grid_of`).
        counters: ``[heads]``, int32 zeros, which are zero again afterwards.
        heads: How many query heads.
        window: Slots in sight, the new one included.
        slots: Upper bound of the slots that are filled.
        scale: Multiplies the scores.
        softcap: Bound of the scores, 0 for none.
        epsilon: Epsilon of the norms.
        weight_offset: What is added to the weights of the norms.
        multiprocessors: How many the GPU has.
        traced: Whether warps write times.

    Raises:
        UnsupportedModelError: If the kernel does not take the size of a head.
    """
    _, key_heads, capacity, head = keys.shape
    grid = grid_of(min(slots, window), heads, key_heads, multiprocessors)
    arguments = AttentionArguments(
        qkv=address(qkv),
        cosines=address(cosines),
        sines=address(sines),
        q_weight=address(q_norm),
        k_weight=address(k_norm),
        keys=address(keys),
        values=address(values),
        out=address(out),
        slot=address(slot),
        position=address(position),
        partials=address(partials),
        counters=address(counters),
        key_heads=key_heads,
        capacity=capacity,
        window=window,
        scale=scale,
        softcap=softcap,
        epsilon=epsilon,
        weight_offset=weight_offset,
    )
    function = _function(
        keys.get_device(),
        keys.dtype,
        head=head,
        rotary=cosines.shape[1],
        queries=heads // key_heads,
        heads=grid.heads,
        head_norm=q_norm is not None,
        softcap=softcap > 0,
        traced=traced,
    )
    return Launch(function, arguments, grid.splits, grid.columns)


@cache
def _function(
    device: int,
    dtype: torch.dtype,
    *,
    head: int,
    rotary: int,
    queries: int,
    heads: int,
    head_norm: bool,
    softcap: bool,
    traced: bool,
) -> Function:
    if head > _MAX_HEAD or head * dtype.itemsize % VECTOR_BYTES or rotary > head or rotary % 2:
        raise UnsupportedModelError(
            f"heads of {head} columns, {rotary} of them rotated: expected at most {_MAX_HEAD}, "
            f"and a multiple of {VECTOR_BYTES} bytes"
        )
    defines = dict(
        DTYPE=DTYPES[dtype],
        HEAD=head,
        ROTARY=rotary,
        HEADS=heads,
        QUERIES=queries,
        UNSPLIT_SLOTS=_UNSPLIT_SLOTS,
        SPLIT_SLOTS=_SLOTS_PER_SPLIT,
        MAX_SPLITS=_MAX_SPLITS,
        HEAD_NORM=int(head_norm),
        SOFTCAP=int(softcap),
        TRACE=int(traced),
    )
    return Function(device, "attention/attention.cu", defines, threads=32 * _WARPS, shared_bytes=0)
