"""Which compiled kernel a call uses: how long a row is, and how the ring in shared memory is cut for it."""

import math
from dataclasses import dataclass
from functools import cache

import torch

__all__ = ["MAX_BATCH", "VECTOR_BYTES", "Variant", "variant_for"]

MAX_BATCH = 2
VECTOR_BYTES = 16
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
# Two blocks fit one multiprocessor of Hopper, so that the next call can begin while this one ends.
_RING_BYTES = 113 * 1024
_CHUNK_BYTES = 16 * 1024
_MAX_VECTORS_PER_THREAD = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """What one compiled kernel is specialised for.

    Args:
        hidden: D.
        dtype: Of inputs, weights and output.
        batch: B.
        activation: As the operator takes it.
        rows: Rows of a chunk, a power of two up to 32.
        chunks: Chunks of the ring.
        warps: Worker warps of a block.
        min_blocks: Blocks of a multiprocessor that registers must suffice for.
        shared_bytes: Shared memory of a block.
    """

    hidden: int
    dtype: torch.dtype
    batch: int
    activation: str
    rows: int
    chunks: int
    warps: int
    min_blocks: int
    shared_bytes: int

    @property
    def threads(self) -> int:
        """Of a block: the workers and the scheduler."""
        return 32 * (self.warps + 1)

    def defines(self) -> dict[str, int]:
        """The macros that ``gated_mlp.cu`` expects."""
        return {
            "DTYPE": _DTYPES[self.dtype],
            "HIDDEN": self.hidden,
            "BATCH": self.batch,
            "ACTIVATION": _ACTIVATIONS[self.activation],
            "ROWS": self.rows,
            "CHUNKS": self.chunks,
            "WARPS": self.warps,
            "MIN_BLOCKS": self.min_blocks,
            "SHARED_BYTES": self.shared_bytes,
        }


@cache
def variant_for(
    hidden: int, dtype: torch.dtype, batch: int, activation: str, *, shared_limit: int
) -> Variant | None:
    """The variant for a call on a GPU with ``shared_limit`` bytes of shared memory a block.

    Returns None where a row is too long for the ring or for the registers.
    """
    row_bytes = hidden * dtype.itemsize
    vectors = row_bytes // VECTOR_BYTES
    warps = min(8, math.ceil(vectors / 32))
    if vectors > 32 * warps * _MAX_VECTORS_PER_THREAD:
        warps = 16
    if vectors > 32 * warps * _MAX_VECTORS_PER_THREAD:
        return None
    rows = 1
    while rows < 16 and 2 * rows * row_bytes <= _CHUNK_BYTES:
        rows *= 2
    budget = min(shared_limit, _RING_BYTES)
    # beside the rows: dot products, factors, queue entries, barriers (`struct Shared`)
    chunk_bytes = rows * (row_bytes + 4 * batch * (warps + 3) + 32) + 64
    chunks = (budget - 256) // chunk_bytes
    if chunks < 2:
        return None
    return Variant(
        hidden=hidden,
        dtype=dtype,
        batch=batch,
        activation=activation,
        rows=rows,
        chunks=min(chunks, 32),
        warps=warps,
        min_blocks=2 if vectors * batch <= 8 * 32 * 4 and warps <= 8 else 1,
        shared_bytes=budget,
    )
