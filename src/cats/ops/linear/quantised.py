"""``quantised.cu``: its arguments, the size of its ring, and its launch."""

import ctypes
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from cats.errors import ShapeError, UnsupportedModelError
from cats.ops.cuda.arguments import Arguments, Pointer, address
from cats.ops.cuda.device import DTYPES, VECTOR_BYTES, shared_memory
from cats.ops.cuda.function import Function, Launch
from cats.ops.cuda.residual import Residual
from cats.ops.cuda.runs import Deal
from cats.ops.quantised import PackedRows, RowLayout

__all__ = ["QuantisedLinearArguments", "launch", "macros", "most_rows"]

_MATRICES = 3  # of one launch: those of queries, keys and values
_MIN_CHUNKS, _MAX_CHUNKS = 4, 8
# As in cuda.py: what is on its way to a multiprocessor while the kernel before this one still runs,
# and what a ring leaves to the block of attention beside it.
_EARLY_BYTES = 32 * 1024
_SPARE_BYTES = 24 * 1024
# A barrier, slots of warps and what alignment may add.
_FIXED_BYTES = 512
# So much that no block of an MLP fits beside the ring: rows that arrive while the MLP still reads
# its own would keep it waiting.
_RING_BYTES = 140 * 1024


class QuantisedLinearArguments(Arguments):
    """``struct Arguments`` of the source."""

    __slots__ = ()
    _fields_ = (
        ("residual", Residual),
        ("x", Pointer),
        ("rows", Pointer * _MATRICES),
        ("biases", Pointer * _MATRICES),
        ("add", Pointer),
        ("out", Pointer),
        ("copy", Pointer),
        ("deal", Deal),
        ("ends", ctypes.c_int * _MATRICES),
        ("run_ends", ctypes.c_int * _MATRICES),
        ("request_early", ctypes.c_int),
    )


def launch(
    matrices: Sequence[PackedRows],
    biases: Sequence[Tensor | None],
    *,
    x: Tensor | Residual,
    dtype: torch.dtype,
    out: Tensor,
    add: Tensor | None = None,
    copy: Tensor | None = None,
    counter: Tensor | None = None,
    early: bool = True,
    multiprocessors: int,
    traced: bool = False,
) -> Launch:
    """``out = add + concatenated(matrix @ x + bias)`` for up to three packed matrices.

    Args:
        matrices: Of one layout.
        biases: ``[rows]`` in ``dtype`` or None, one for each matrix.
        x: ``[columns]`` in ``dtype``, or the norm of a residual stream.
        dtype: Of the model: float32, bfloat16 or float16.
        out: ``[all rows]``, float32.
        add: The same shape and dtype.
        copy: The same shape and dtype; also gets the output, or 0 where there is no ``add``.
        counter: One int32 that is zero when the launch starts; the launch changes it. Faster blocks
            then take more rows. None: rows are dealt out by index.
        early: Whether weights may be requested before the kernel before this one has ended.
        multiprocessors: How many the GPU has.
        traced: Whether warps write times.

    Raises:
        ShapeError: If the matrices differ in their layout.
        UnsupportedModelError: If a row does not fit.
    """
    layout = matrices[0].layout
    if any(matrix.layout != layout for matrix in matrices):
        raise ShapeError(
            "matrices of one launch must have the same columns, bits, groups and zero points, "
            f"got {[matrix.layout for matrix in matrices]}: launch them one by one"
        )
    normed = isinstance(x, Residual)
    device = matrices[0].rows.get_device()
    counts = [matrix.count for matrix in matrices]
    most = most_rows(layout, counts, multiprocessors)
    function, rows_of_run = _function(device, layout, dtype, normed, traced, most)
    ends, run_ends = _ends(counts), _ends(-(-count // rows_of_run) for count in counts)
    blocks = min(multiprocessors, run_ends[-1])
    arguments = QuantisedLinearArguments(
        rows=tuple(address(matrix.rows) for matrix in matrices),
        biases=tuple(address(bias, 1) for bias in biases),
        add=address(add),
        out=address(out),
        copy=address(copy),
        deal=Deal.of(run_ends[-1], blocks, counter),
        ends=ends,
        run_ends=run_ends,
        request_early=early,
    )
    if isinstance(x, Residual):
        arguments.residual = x
    else:
        arguments.x = address(x)
    return Launch(function, arguments, blocks)


def _ends(counts: Iterable[int]) -> tuple[int, ...]:
    ends = list(accumulate(counts))
    return tuple(ends + ends[-1:] * (_MATRICES - len(ends)))


def most_rows(layout: RowLayout, counts: Sequence[int], multiprocessors: int) -> int:
    """How many rows a run may have: many suit the products, few divide a small matrix more evenly.

    Args:
        layout: Of the rows.
        counts: Rows of each matrix.
        multiprocessors: How many the GPU has.
    """

    def busy(rows: int) -> float:
        runs = sum(-(-count // rows) for count in counts)
        return runs / (-(-runs // multiprocessors) * multiprocessors)

    most = 16 if layout.bits == 4 else 8
    return most if busy(most) >= 0.9 * busy(most // 2) else most // 2


@cache
def _function(
    device: int, layout: RowLayout, dtype: torch.dtype, normed: bool, traced: bool, most: int
) -> tuple[Function, int]:
    """The kernel, and how many rows a run has."""
    limit = shared_memory(device)
    defines = macros(
        layout, dtype=dtype, normed=normed, traced=traced, most_rows=most, shared_limit=limit
    )
    threads = 32 * (layout.warps + 2)  # workers, the copier and the reducer
    function = Function(
        device,
        "linear/quantised.cu",
        defines,
        threads=threads,
        shared_bytes=defines["SHARED_BYTES"],
    )
    return function, defines["ROWS_OF_CHUNK"]


def macros(
    layout: RowLayout,
    *,
    dtype: torch.dtype,
    normed: bool,
    most_rows: int,
    shared_limit: int,
    traced: bool = False,
) -> dict[str, int]:
    """The macros of the source; ``CHUNKS`` chunks of ``ROWS_OF_CHUNK`` rows are its ring.

    Args:
        layout: Of the rows.
        dtype: Of the model.
        normed: Whether the input is the norm of a residual stream.
        most_rows: How many rows a chunk may have: 16, 8 or 4.
        shared_limit: Shared memory that a block may have, in bytes.
        traced: Whether warps write times.

    Raises:
        UnsupportedModelError: If a row does not fit.
    """
    if normed and layout.columns * dtype.itemsize % VECTOR_BYTES:
        raise UnsupportedModelError(
            f"the residual stream must be a multiple of {VECTOR_BYTES} bytes in {dtype}, "
            f"got {layout.columns} elements"
        )
    rows, chunks = _ring(layout, most_rows, shared_limit - _FIXED_BYTES)
    chunk = _chunk_bytes(layout, rows)
    return dict(
        **layout.macros,
        ROWS_OF_CHUNK=rows,
        DTYPE=DTYPES[dtype],
        INPUTS=layout.columns,
        NORMED=int(normed),
        CHUNKS=chunks,
        EARLY_CHUNKS=max(1, _EARLY_BYTES // chunk),
        SHARED_BYTES=_FIXED_BYTES + chunks * chunk,
        TRACE=int(traced),
    )


def _ring(layout: RowLayout, most: int, room: int) -> tuple[int, int]:
    """Rows of a chunk and number of chunks: several, since some must be on their way."""
    for rows in (16, 8, 4):
        chunks = (room - _SPARE_BYTES) // _chunk_bytes(layout, rows)
        if rows <= most and chunks >= _MIN_CHUNKS:
            return rows, min(chunks, _MAX_CHUNKS, max(2, _RING_BYTES // _chunk_bytes(layout, rows)))
    chunks = room // _chunk_bytes(layout, 4)
    if chunks < 1:
        raise UnsupportedModelError(
            f"rows of {layout.pitch} bytes are too long for the shared memory"
        )
    return 4, chunks


def _chunk_bytes(layout: RowLayout, rows: int) -> int:
    # rows, the sums of each warp, three barriers, first row and count
    return rows * layout.pitch + 4 * layout.warps * rows + 3 * 8 + 2 * 4
