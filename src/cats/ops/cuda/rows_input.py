"""How rows of 16-bit weights are cut for the products of several tokens: ``rows_input.cuh``."""

import math

import torch

from cats.errors import UnsupportedModelError
from cats.ops.cuda.device import DTYPES, VECTOR_BYTES

__all__ = [
    "ROWS_OF_CHUNK",
    "TOKENS",
    "chunk_bytes",
    "fits_beside",
    "input_macros",
    "tokens_at_once",
]

TOKENS = (1, 2, 4, 8, 16)
"""Numbers of tokens that kernels are compiled for."""
ROWS_OF_CHUNK = 8
# Of a row, the most that is one copy. A copy takes a warp about as long as the memory takes for
# 1.3 KB, so shorter ones keep it less busy.
_PART_BYTES = 4096
_UNIT = 32  # columns that the lanes of a row read at once
# Words of the input that a thread may keep in its registers. Up to 8 tokens, they leave room for a
# second block of 8 workers on a multiprocessor.
_WORDS, _WORDS_OF_16_TOKENS = 64, 128


def tokens_at_once(width: int, dtype: torch.dtype, tokens: int) -> int:
    """How many of the tokens one launch can take: all, or half of them where rows are long.

    Args:
        width: Columns.
        dtype: Of the weights.
        tokens: One of :data:`TOKENS`.

    Raises:
        UnsupportedModelError: If no kernel takes such rows.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise UnsupportedModelError(
            f"no kernel takes several tokens with weights in {dtype}, only bfloat16 and float16"
        )
    if width * dtype.itemsize % VECTOR_BYTES:
        raise UnsupportedModelError(
            f"rows must be a multiple of {VECTOR_BYTES} bytes, {width} columns have "
            f"{width * dtype.itemsize}"
        )
    for at_once in (tokens, tokens // 2):
        if at_once and _warps(width, at_once):
            return at_once
    raise UnsupportedModelError(f"rows of {width} columns are too long for {tokens} tokens")


def input_macros(width: int, dtype: torch.dtype, tokens: int) -> dict[str, int]:
    """The macros of the source, for a number of tokens that :func:`tokens_at_once` allows."""
    warps = _warps(width, tokens)
    assert warps is not None
    return dict(
        DTYPE=DTYPES[dtype],
        WIDTH=width,
        TOKENS=tokens,
        WARPS=warps,
        ROWS=ROWS_OF_CHUNK,
        PARTS=_parts(width),
    )


def chunk_bytes(macros: dict[str, int]) -> int:
    """Shared memory of a chunk."""
    units = math.ceil(math.ceil(macros["WIDTH"] / _UNIT) / macros["PARTS"])
    part = 2 * _UNIT * units
    return macros["ROWS"] * (part + (0 if part % 128 == 64 else 64))


def fits_beside(macros: dict[str, int]) -> bool:
    """Whether the registers leave room for a block of another launch on a multiprocessor."""
    return macros["WARPS"] == 8 and _words(macros["WIDTH"], macros["TOKENS"], 8) <= _WORDS


def _parts(width: int) -> int:
    units = math.ceil(width / _UNIT)
    parts = math.ceil(2 * _UNIT * units / _PART_BYTES)
    # fewer where rounding up left the last ones empty
    return math.ceil(units / math.ceil(units / parts))


def _words(width: int, tokens: int, warps: int) -> int:
    """Words of the input of each thread."""
    parts = _parts(width)
    units = math.ceil(math.ceil(width / _UNIT) / parts)
    return 4 * math.ceil(tokens / 8) * parts * math.ceil(units / warps)


def _warps(width: int, tokens: int) -> int | None:
    """Workers of a block, or None where the input does not fit into their registers."""
    for warps, most in ((8, _WORDS_OF_16_TOKENS if tokens > 8 else _WORDS), (16, _WORDS)):
        if _words(width, tokens, warps) <= most:
            return warps
    return None
