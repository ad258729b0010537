"""``mlp_rows.cu``: its arguments, the size of its ring, and its launches."""

import ctypes
from functools import cache

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
from cats.ops.mlp.cuda.variant import ACTIVATION_CODES

__all__ = ["MLPRowsArguments", "launches", "macros"]

_MAX_CHUNKS = 8
# Keeps the memory busy, and leaves room for a block of the next launch.
_RING_BYTES = 100 * 1024
# Where its registers leave no room for another block.
_RING_BYTES_ALONE = 170 * 1024
# What is on its way to a multiprocessor while the kernel before this one still runs.
_EARLY_BYTES = 32 * 1024
# Outputs of a pass: their sums stay in registers, and a chunk has so many of 16 columns.
_PASS_OUTPUTS = 1024
# Runs that a block may take beyond its even share, at least: faster blocks take more.
_SPARE_RUNS = 8
# The share of the runs that are dealt out by index.
_BY_INDEX = 0.75
# Whether the next launch may start as soon as this one may read what earlier ones wrote.
_NEXT_EARLY = False


class MLPRowsArguments(Arguments):
    """``struct Arguments`` of the source."""

    __slots__ = ()
    _fields_ = (
        ("x", Pointer),
        ("gate", Pointer),
        ("up", Pointer),
        ("down", Pointer),
        ("thresholds", Pointer),
        ("gate_bias", Pointer),
        ("up_bias", Pointer),
        ("active", Pointer),
        ("sums", Pointer),
        ("deal", Deal),
        ("neurons", ctypes.c_int),
        ("request_early", ctypes.c_int),
    )


def launches(
    *,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    thresholds: Tensor,
    activation: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    active: Tensor | None,
    sums: Tensor,
    counters: Tensor | None,
    multiprocessors: int,
    early: bool = True,
    traced: bool = False,
) -> list[Launch]:
    """Add the output of the MLP for each token to ``sums``; the gate is the router.

    One launch; two of half the tokens each where 16 tokens of long rows do not fit.

    Args:
        x: ``[tokens, D]`` in the dtype of the weights, contiguous; 1, 2, 4, 8 or 16 tokens.
        gate: ``[F, D]``, row-major, bfloat16 or float16.
        up: ``[F, D]``, row-major.
        down: ``[D, F]``, column-major.
        thresholds: ``[F]``, float32.
        activation: A name of :data:`cats.functional.ACTIVATIONS`.
        gate_bias: ``[F]`` or None.
        up_bias: ``[F]`` or None.
        active: ``[tokens]``, int32. A token with 0 keeps no neuron, so none is read for it. None:
            all are active.
        sums: ``[tokens, D]``, float32, contiguous.
        counters: Two int32 that are zero when the launches start: blocks that are faster take more
            neurons. None: neurons are dealt out by index.
        multiprocessors: How many the GPU has.
        early: Whether weights may be requested before the kernel before the first has ended.
        traced: Whether warps write times.

    Raises:
        UnsupportedModelError: If the kernel does not take the dtype, or rows as long as these.
    """
    tokens, hidden = x.shape
    neurons, device = len(gate), gate.get_device()
    at_once = tokens_at_once(hidden, gate.dtype, tokens)
    function, capacity = _function(
        device, hidden, gate.dtype, at_once, activation, neurons, multiprocessors, traced
    )
    runs = -(-neurons // rows_input.ROWS_OF_CHUNK)
    blocks = min(multiprocessors, runs)
    result = []
    for number, first in enumerate(range(0, tokens, at_once)):
        part = slice(first, first + at_once)
        counter = None if counters is None else counters[number : number + 1]
        arguments = MLPRowsArguments(
            x=address(x[part]),
            gate=address(gate),
            up=address(up),
            down=address(down),
            thresholds=address(thresholds, 4),
            gate_bias=address(gate_bias, 2),
            up_bias=address(up_bias, 2),
            active=0 if active is None else address(active[part], 4),
            sums=address(sums[part]),
            deal=Deal.of(runs, blocks, counter, by_index=_BY_INDEX),
            neurons=neurons,
            request_early=early or number > 0,
        )
        assert (arguments.deal.fixed + 4) * rows_input.ROWS_OF_CHUNK <= capacity
        result.append(Launch(function, arguments, blocks))
    return result


@cache
def _function(
    device: int,
    hidden: int,
    dtype: torch.dtype,
    tokens: int,
    activation: str,
    neurons: int,
    multiprocessors: int,
    traced: bool,
) -> tuple[Function, int]:
    """The kernel, and how many neurons a block can keep."""
    defines = macros(
        hidden,
        dtype,
        tokens,
        activation=activation,
        neurons=neurons,
        multiprocessors=multiprocessors,
        shared_limit=shared_memory(device),
        traced=traced,
    )
    function = Function(
        device,
        "mlp/cuda/mlp_rows.cu",
        defines,
        threads=32 * (defines["WARPS"] + 2),  # workers, the copier and the evaluator
        shared_bytes=defines["SHARED_BYTES"],
    )
    return function, defines["LIST"]


def macros(
    hidden: int,
    dtype: torch.dtype,
    tokens: int,
    *,
    activation: str,
    neurons: int,
    multiprocessors: int,
    shared_limit: int,
    traced: bool = False,
) -> dict[str, int]:
    """The macros of the source.

    Args:
        hidden: D.
        dtype: Of the weights.
        tokens: As many as :func:`cats.ops.cuda.rows_input.tokens_at_once` allows.
        activation: A name of :data:`cats.functional.ACTIVATIONS`.
        neurons: How many.
        multiprocessors: How many the GPU has.
        shared_limit: Shared memory that a block may have, in bytes.
        traced: Whether warps write times.

    Raises:
        UnsupportedModelError: If too few chunks fit into the shared memory.
    """
    common = input_macros(hidden, dtype, tokens)
    warps, rows, parts = common["WARPS"], common["ROWS"], common["PARTS"]
    output_tiles = -(-hidden // 16)
    pass_tiles = -(-output_tiles // -(-hidden // _PASS_OUTPUTS))
    passes = -(-output_tiles // pass_tiles)  # fewer where rounding up left the last ones empty
    chunk = -(-max(chunk_bytes(common), 16 * (32 * pass_tiles + 16)) // 128) * 128
    runs = -(-neurons // rows)
    capacity = (-(-runs // min(multiprocessors, runs)) + _SPARE_RUNS) * rows
    # the sums of a run, its three barriers and three numbers
    each_run = 4 * warps * tokens * rows + 3 * 8 + 3 * 4

    def size(chunks: int) -> int:
        ring = chunks * (chunk + 2 * 8) + (-(-chunks // parts) + 1) * each_run
        return ring + 4 * capacity * (tokens + 1) + 512

    # the sums of 16 tokens take as many registers as their input
    beside = fits_beside(common) and tokens <= 8
    most = min(_MAX_CHUNKS, max(2, (_RING_BYTES if beside else _RING_BYTES_ALONE) // chunk))
    chunks = next((n for n in range(most, 1, -1) if size(n) <= shared_limit), None)
    if chunks is None:
        raise UnsupportedModelError(
            f"two chunks of {chunk} bytes do not fit into the shared memory of {shared_limit}"
        )
    return dict(
        **common,
        ACTIVATION=ACTIVATION_CODES[activation],
        PASSES=passes,
        CHUNKS=chunks,
        EARLY_CHUNKS=max(1, _EARLY_BYTES // chunk),
        NEXT_EARLY=int(_NEXT_EARLY),
        LIST=capacity,
        BLOCKS=2 if beside else 1,
        SHARED_BYTES=size(chunks),
        TRACE=int(traced),
    )
