"""``quantised_mlp.cu``: its arguments, the size of its ring, and its launch."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from cats.errors import ShapeError, UnsupportedModelError
from cats.ops.cuda.arguments import Arguments, Pointer, address
from cats.ops.cuda.device import DTYPES, VECTOR_BYTES, shared_memory
from cats.ops.cuda.function import Function, Launch
from cats.ops.cuda.residual import Residual
from cats.ops.mlp.cuda.variant import ACTIVATION_CODES
from cats.ops.quantised import SCALE_CODES, ColumnLayout, PackedColumns, PackedRows, RowLayout

__all__ = ["QuantisedMLPArguments", "launch", "macros"]

_MIN_CHUNKS, _MAX_CHUNKS = 3, 8
# By bits: four and three chunks of rows of 4,096 columns, as whole tokens took least time.
_RING_BYTES = {4: 140 * 1024, 8: 104 * 1024}
# What is on its way to a multiprocessor while the kernel before this one still runs.
_EARLY_BYTES = 32 * 1024


class QuantisedMLPArguments(Arguments):
    """``struct Arguments`` of the source."""

    __slots__ = ()
    _fields_ = (
        ("residual", Residual),
        ("gate", Pointer),
        ("up", Pointer),
        ("down", Pointer),
        ("down_scales", Pointer),
        ("down_extras", Pointer),
        ("thresholds", Pointer),
        ("gate_bias", Pointer),
        ("up_bias", Pointer),
        ("sums", Pointer),
        ("neurons", ctypes.c_int),
        ("neurons_of_block", ctypes.c_int),
        ("request_early", ctypes.c_int),
    )


def launch(
    *,
    x: Residual,
    gate: PackedRows,
    up: PackedRows,
    down: PackedColumns,
    thresholds: Tensor,
    activation: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    dtype: torch.dtype,
    sums: Tensor,
    multiprocessors: int,
    early: bool = True,
    plain: bool = False,
    traced: bool = False,
) -> Launch:
    """Add the output of the MLP of one token to ``sums``.

    Args:
        x: The input, the norm of a residual stream of ``D`` numbers; its base where it is plain.
        gate: ``F`` packed rows of ``D`` columns.
        up: The same, in the same layout.
        down: ``F`` packed columns of ``D`` outputs.
        thresholds: ``[F]``, float32.
        activation: A name of :data:`cats.functional.ACTIVATIONS`.
        gate_bias: ``[F]`` in ``dtype`` or None.
        up_bias: ``[F]`` in ``dtype`` or None.
        dtype: Of the model: float32, bfloat16 or float16.
        sums: ``[D]``, float32.
        multiprocessors: How many the GPU has.
        early: Whether weights may be requested before the kernel before this one has ended.
        plain: Whether ``x.base`` is the input itself, without a norm.
        traced: Whether warps write times.

    Raises:
        ShapeError: If the three matrices do not belong together.
        UnsupportedModelError: If a row does not fit.
    """
    neurons, hidden = gate.count, gate.layout.columns
    if up.layout != gate.layout:
        raise ShapeError(f"gate and up must have one layout, got {gate.layout} and {up.layout}")
    sizes = up.count, len(down.columns), down.layout.outputs
    if sizes != (neurons, neurons, hidden):
        raise ShapeError(
            f"gate has {neurons} rows of {hidden} columns, but up has {sizes[0]} rows, and down "
            f"{sizes[1]} columns of {sizes[2]} outputs"
        )
    device = gate.rows.get_device()
    function, of_block = _function(
        device, gate.layout, down.layout, dtype, activation, neurons, multiprocessors, traced, plain
    )
    arguments = QuantisedMLPArguments(
        residual=x,
        gate=address(gate.rows),
        up=address(up.rows),
        down=address(down.columns),
        down_scales=address(down.scales),
        down_extras=address(down.extras, 4),
        thresholds=address(thresholds, 4),
        gate_bias=address(gate_bias, 1),
        up_bias=address(up_bias, 1),
        sums=address(sums),
        neurons=neurons,
        neurons_of_block=of_block,
        request_early=early,
    )
    return Launch(function, arguments, -(-neurons // of_block))


@cache
def _function(
    device: int,
    rows: RowLayout,
    columns: ColumnLayout,
    dtype: torch.dtype,
    activation: str,
    neurons: int,
    multiprocessors: int,
    traced: bool,
    plain: bool,
) -> tuple[Function, int]:
    """The kernel, and how many neurons a block takes."""
    defines = macros(
        rows,
        columns,
        dtype=dtype,
        activation=activation,
        neurons=neurons,
        multiprocessors=multiprocessors,
        shared_limit=shared_memory(device),
        traced=traced,
        plain=plain,
    )
    function = Function(
        device,
        "mlp/cuda/quantised_mlp.cu",
        defines,
        threads=32 * (rows.warps + 2),  # workers, the copier and the evaluator
        shared_bytes=defines["SHARED_BYTES"],
    )
    return function, defines["LIST"]


def macros(
    rows: RowLayout,
    columns: ColumnLayout,
    *,
    dtype: torch.dtype,
    activation: str,
    neurons: int,
    multiprocessors: int,
    shared_limit: int,
    traced: bool = False,
    plain: bool = False,
) -> dict[str, int]:
    """The macros of the source.

    Args:
        rows: Of gate and up.
        columns: Of down.
        dtype: Of the model.
        activation: A name of :data:`cats.functional.ACTIVATIONS`.
        neurons: How many.
        multiprocessors: How many the GPU has.
        shared_limit: Shared memory that a block may have, in bytes.
        traced: Whether warps write times.
        plain: Whether the input is the base of its residual stream.

    Raises:
        UnsupportedModelError: If a row does not fit.
    """
    hidden = rows.columns
    if hidden * dtype.itemsize % VECTOR_BYTES:
        raise UnsupportedModelError(
            f"the residual stream must be a multiple of {VECTOR_BYTES} bytes in {dtype}, "
            f"got {hidden} elements"
        )
    rows_of_chunk = 16 if rows.bits == 4 else 8
    # neighbours, which share scales of down, and whole chunks
    of_block = -(-neurons // (rows_of_chunk * multiprocessors)) * rows_of_chunk
    chunk_rows = rows_of_chunk * rows.pitch
    chunk_columns = (16 if columns.bits == 4 else 8) * columns.pitch
    chunk = -(-max(chunk_rows, chunk_columns) // 128) * 128
    # the sums of each warp, three barriers and four numbers
    each = chunk + 4 * rows.warps * rows_of_chunk + 3 * 8 + 4 * 4
    fixed = 8 * of_block + 4 * rows.warps + 512
    most = min(_MAX_CHUNKS, max(_MIN_CHUNKS, _RING_BYTES[rows.bits] // each))
    chunks = min(most, (shared_limit - fixed) // each)
    if chunks < _MIN_CHUNKS:
        raise UnsupportedModelError(
            f"{_MIN_CHUNKS} chunks of {chunk} bytes do not fit into the shared memory"
        )
    return dict(
        **rows.macros,
        ROWS_OF_CHUNK=rows_of_chunk,
        DTYPE=DTYPES[dtype],
        INPUTS=hidden,
        ACTIVATION=ACTIVATION_CODES[activation],
        CHUNKS=chunks,
        EARLY_CHUNKS=max(1, _EARLY_BYTES // chunk),
        LIST=of_block,
        SHARED_BYTES=fixed + chunks * each,
        TRACE=int(traced),
        PLAIN_INPUT=int(plain),
        DOWN_BITS=columns.bits,
        DOWN_GROUP=columns.group_size,
        DOWN_SCALE=SCALE_CODES[columns.scale_dtype],
        DOWN_ZERO_MODE=int(columns.zero_mode),
        DOWN_CONSTANT_ZERO=columns.zero,
    )
