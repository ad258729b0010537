"""``attention_rows.cu``: its arguments, how it is cut into blocks, and its launch."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from cats.errors import UnsupportedModelError
from cats.ops.attention import cuda
from cats.ops.attention.cuda import Grid
from cats.ops.cuda.arguments import Arguments, Pointer, address
from cats.ops.cuda.device import DTYPES, VECTOR_BYTES
from cats.ops.cuda.function import Function, Launch

__all__ = ["AttentionRowsArguments", "grid_of", "launch"]

_WARPS = 8
_MAX_HEAD = 256
# As in cuda.py.
_UNSPLIT_SLOTS = 256
_SLOTS_PER_SPLIT = 64
_MAX_SPLITS = 64


class AttentionRowsArguments(Arguments):
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
        ("lines", Pointer),
        ("active", Pointer),
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


def grid_of(rows: int, slots: int, heads: int, key_heads: int, multiprocessors: int) -> Grid:
    """The grid for rows of up to ``slots`` slots: its columns are groups of heads of all rows."""
    return cuda.grid_of(slots, rows * heads, rows * key_heads, multiprocessors)


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
    positions: Tensor,
    lines: Tensor,
    active: Tensor,
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
    """Rotate the queries and keys of each row's new token, write its keys and values, and attend.

    ``H`` is the size of a head, ``S`` how much of it is rotated.

    Args:
        qkv: ``[rows, (heads + 2 * key heads) * H]``, float32, contiguous.
        cosines: ``[capacity, S]``, float32.
        sines: ``[capacity, S]``, float32.
        q_norm: ``[H]``, weights of the norm of each query, or None.
        k_norm: ``[H]``, weights of the norm of each key, or None.
        keys: ``[lines, key heads, capacity, H]``, contiguous.
        values: The same.
        out: ``[rows, heads * H]``, in the dtype of the cache.
        positions: ``[rows]``, int64: position and slot of each new token.
        lines: ``[rows]``, int64: the line of each row.
        active: ``[rows]``, int32: 0 where a row is not used. Nothing is written for it.
        partials: float32, scratch memory: ``rows * splits * heads * (H + 2)``, with splits of
            :func:`grid_of`.
        counters: ``[rows * heads]``, int32 zeros, which are zero again afterwards.
        heads: How many query heads.
        window: Slots in sight, the new one included.
        slots: Upper bound of the slots that are filled in any row.
        scale: Multiplies the scores.
        softcap: Bound of the scores, 0 for none.
        epsilon: Epsilon of the norms.
        weight_offset: What is added to the weights of the norms.
        multiprocessors: How many the GPU has.
        traced: Whether warps write times.

    Raises:
        UnsupportedModelError: If the kernel does not take the size of a head.
    """
    rows = len(qkv)
    _, key_heads, capacity, head = keys.shape
    grid = grid_of(rows, min(slots, window), heads, key_heads, multiprocessors)
    assert counters.numel() >= grid.columns
    assert grid.splits == 1 or partials.numel() >= rows * grid.splits * heads * (head + 2)
    arguments = AttentionRowsArguments(
        qkv=address(qkv),
        cosines=address(cosines),
        sines=address(sines),
        q_weight=address(q_norm),
        k_weight=address(k_norm),
        keys=address(keys),
        values=address(values),
        out=address(out),
        slot=address(positions, 8),
        position=address(positions, 8),
        lines=address(lines, 8),
        active=address(active, 4),
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
        per_block=grid.heads,
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
    per_block: int,
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
        HEADS=per_block,
        QUERIES=queries,
        UNSPLIT_SLOTS=_UNSPLIT_SLOTS,
        SPLIT_SLOTS=_SLOTS_PER_SPLIT,
        MAX_SPLITS=_MAX_SPLITS,
        HEAD_NORM=int(head_norm),
        SOFTCAP=int(softcap),
        TRACE=int(traced),
    )
    source = "attention/attention_rows.cu"
    return Function(device, source, defines, threads=32 * _WARPS, shared_bytes=0)
