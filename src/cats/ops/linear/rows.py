"""``linear_rows.cu``: its arguments, the size of its ring, and its launches."""

import ctypes
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from cats.errors import UnsupportedModelError
from cats.ops.cuda import rows_input
from cats.ops.cuda.arguments import Arguments, Pointer, address
from cats.ops.cuda.device import shared_memory
from cats.ops.cuda.function import Function, Launch
from cats.ops.cuda.rows_input import (
    chunk_bytes,
    fits_beside,
    input_macros,
    tokens_at_once,
)
from cats.ops.cuda.runs import Deal

__all__ = ["LinearRowsArguments", "launches", "macros"]

_MATRICES = 3  # of one launch: those of queries, keys and values
_MAX_CHUNKS = 8
# As in cuda.py: what is on its way to a multiprocessor while the kernel before this one still runs.
_EARLY_BYTES = 32 * 1024
# Keeps the memory busy, and leaves room for a block of the next launch.
_RING_BYTES = 100 * 1024
# Where its registers leave no room for another block.
_RING_BYTES_ALONE = 180 * 1024
# Whether the next launch may start as soon as this one may read what earlier ones wrote.
_NEXT_EARLY = False


class LinearRowsArguments(Arguments):
    """``struct Arguments`` of the source."""

    __slots__ = ()
    _fields_ = (
        ("x", Pointer),
        ("weights", Pointer * _MATRICES),
        ("biases", Pointer * _MATRICES),
        ("add", Pointer),
        ("out", Pointer),
        ("copy", Pointer),
        ("deal", Deal),
        ("ends", ctypes.c_int * _MATRICES),
        ("run_ends", ctypes.c_int * _MATRICES),
        ("stride", ctypes.c_int),
        ("request_early", ctypes.c_int),
    )


def launches(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    x: Tensor,
    out: Tensor,
    add: Tensor | None = None,
    copy: Tensor | None = None,
    counters: Tensor | None = None,
    early: bool = True,
    multiprocessors: int,
    traced: bool = False,
) -> list[Launch]:
    """``out = add + x @ concatenated(weights).T + biases`` for up to three matrices.

    One launch; two of half the tokens each where 16 tokens of long rows do not fit.

    Args:
        weights: ``[rows, D]`` each, row-major, bfloat16 or float16.
        biases: ``[rows]`` or None, one for each weight.
        x: ``[tokens, D]`` in the dtype of the weights, contiguous; 1, 2, 4, 8 or 16 tokens.
        out: ``[tokens, all rows]``, float32, contiguous along the rows.
        add: The same shape, dtype and strides; may be ``out`` itself.
        copy: The same; also gets the output, or 0 where there is no ``add``.
        counters: Two int32 that are zero when the launches start; the launches change them. Faster
            blocks then take more rows. None: rows are dealt out by index.
        early: Whether weights may be requested before the kernel before the first has ended.
        multiprocessors: How many the GPU has.
        traced: Whether warps write times.

    Raises:
        UnsupportedModelError: If the kernel does not take the dtype, or rows as long as these.
    """
    tokens, width = x.shape
    dtype, device = weights[0].dtype, weights[0].get_device()
    at_once = tokens_at_once(width, dtype, tokens)
    function = _function(device, width, dtype, at_once, traced)
    counts = [len(weight) for weight in weights]
    ends, run_ends = _ends(counts), _ends(-(-count // rows_input.ROWS_OF_CHUNK) for count in counts)
    blocks = min(multiprocessors, run_ends[-1])
    result = []
    for number, first in enumerate(range(0, tokens, at_once)):
        part = slice(first, first + at_once)
        arguments = LinearRowsArguments(
            x=address(x[part]),
            weights=tuple(address(weight) for weight in weights),
            biases=tuple(address(bias, 2) for bias in biases),
            add=0 if add is None else address(add[part], 4),
            out=address(out[part], 4),
            copy=0 if copy is None else address(copy[part], 4),
            deal=Deal.of(
                run_ends[-1], blocks, None if counters is None else counters[number : number + 1]
            ),
            ends=ends,
            run_ends=run_ends,
            stride=out.stride(0),
            request_early=early or number > 0,
        )
        result.append(Launch(function, arguments, blocks))
    return result


def _ends(counts: Iterable[int]) -> tuple[int, ...]:
    ends = list(accumulate(counts))
    return tuple(ends + ends[-1:] * (_MATRICES - len(ends)))


@cache
def _function(device: int, width: int, dtype: torch.dtype, tokens: int, traced: bool) -> Function:
    defines = macros(width, dtype, tokens, shared_limit=shared_memory(device), traced=traced)
    return Function(
        device,
        "linear/linear_rows.cu",
        defines,
        threads=32 * (defines["WARPS"] + 2),  # workers, the copier and the reducer
        shared_bytes=defines["SHARED_BYTES"],
    )


def macros(
    width: int, dtype: torch.dtype, tokens: int, *, shared_limit: int, traced: bool = False
) -> dict[str, int]:
    """The macros of the source.

    Args:
        width: Columns.
        dtype: Of the weights.
        tokens: As many as :func:`cats.ops.cuda.rows_input.tokens_at_once` allows.
        shared_limit: Shared memory that a block may have, in bytes.
        traced: Whether warps write times.

    Raises:
        UnsupportedModelError: If too few chunks fit into the shared memory.
    """
    common = input_macros(width, dtype, tokens)
    chunk, parts = chunk_bytes(common), common["PARTS"]
    beside = fits_beside(common)
    ring = _RING_BYTES if beside else _RING_BYTES_ALONE
    # the sums of a run, its three barriers, row and count
    each_run = 4 * common["WARPS"] * tokens * common["ROWS"] + 3 * 8 + 2 * 4

    def size(chunks: int) -> int:
        runs = -(-chunks // parts) + 1
        return chunks * (chunk + 2 * 8) + runs * each_run + 8 + 256

    most = min(_MAX_CHUNKS, max(2, ring // chunk))
    chunks = next((n for n in range(most, 1, -1) if size(n) <= shared_limit), None)
    if chunks is None:
        raise UnsupportedModelError(
            f"two chunks of {chunk} bytes do not fit into the shared memory of {shared_limit}"
        )
    return dict(
        **common,
        CHUNKS=chunks,
        EARLY_CHUNKS=max(1, _EARLY_BYTES // chunk),
        NEXT_EARLY=int(_NEXT_EARLY),
        BLOCKS=2 if beside else 1,
        SHARED_BYTES=size(chunks),
        TRACE=int(traced),
    )
