"""Which compiled kernel a call uses: how shared memory is divided for rows of a given length."""

import math
from dataclasses import dataclass
from functools import cache

import torch

from cats.ops.cuda.device import DTYPES, VECTOR_BYTES

__all__ = ["MAX_BATCH", "Variant", "variant_for"]

MAX_BATCH = 2
ACTIVATION_CODES = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
_COPIES = 2
_MAX_VECTORS_PER_THREAD = 4
# Shared memory of a group beside its chunks: two queues of at most 64 neurons, and padding.
_QUEUE_BYTES = 2048
# Three chunks keep memory busy. With more, the end of a call takes longer.
_CHUNKS = 3
_MAX_ROWS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """What one compiled kernel is specialised for.

    Args:
        hidden: D.
        dtype: Dtype of inputs, weights and output.
        batch: B.
        activation: A name of :data:`cats.functional.ACTIVATIONS`.
        groups: Schedulers per block, each with its own workers and ring.
        rows: Rows per chunk, a power of two up to 32.
        chunks: Chunks per ring.
        warps: Worker warps per group.
        copies: Copies of the sums that blocks add to.
        shared_bytes: Shared memory per block.
        residual: Whether it reads the norm of a residual stream and adds to it.
    """

    hidden: int
    dtype: torch.dtype
    batch: int
    activation: str
    groups: int
    rows: int
    chunks: int
    warps: int
    copies: int
    shared_bytes: int
    residual: bool = False

    @property
    def threads(self) -> int:
        """Threads per block: workers and schedulers."""
        return 32 * self.groups * (self.warps + 1)

    def defines(self) -> dict[str, int]:
        """The macros that ``gated_mlp.cu`` expects."""
        return {
            "DTYPE": DTYPES[self.dtype],
            "HIDDEN": self.hidden,
            "BATCH": self.batch,
            "ACTIVATION": ACTIVATION_CODES[self.activation],
            "GROUPS": self.groups,
            "ROWS": self.rows,
            "CHUNKS": self.chunks,
            "WARPS": self.warps,
            "COPIES": self.copies,
            "SHARED_BYTES": self.shared_bytes,
            "RESIDUAL": int(self.residual),
        }


@cache
def variant_for(
    hidden: int,
    dtype: torch.dtype,
    batch: int,
    activation: str,
    *,
    shared_limit: int,
    residual: bool = False,
) -> Variant | None:
    """The variant for a call on a GPU with ``shared_limit`` bytes of shared memory per block.

    Returns None where a row is too long for the ring or for the registers.
    """
    row_bytes = hidden * dtype.itemsize
    vectors = row_bytes // VECTOR_BYTES
    warps = min(4, math.ceil(vectors / 32))
    while vectors > 32 * warps * _MAX_VECTORS_PER_THREAD and warps < 16:
        warps *= 2
    if vectors > 32 * warps * _MAX_VECTORS_PER_THREAD:
        return None
    # more workers would leave too few registers for each
    groups = 1 if warps * batch > 8 else 4 if vectors <= 256 else 2

    def chunk_bytes(rows: int) -> int:
        """Shared memory of a chunk: rows, partial dot products, factors, barriers and kind."""
        return rows * (row_bytes + 4 * batch * (warps + 1)) + 20

    ring_bytes = shared_limit // groups - _QUEUE_BYTES
    rows = 1
    while rows < _MAX_ROWS and _CHUNKS * chunk_bytes(2 * rows) <= ring_bytes:
        rows *= 2
    chunks = min(_CHUNKS, ring_bytes // chunk_bytes(rows))
    if chunks < 2:
        return None
    return Variant(
        hidden=hidden,
        dtype=dtype,
        batch=batch,
        activation=activation,
        groups=groups,
        rows=rows,
        chunks=chunks,
        warps=warps,
        copies=1 if residual else _COPIES,
        shared_bytes=groups * (chunks * chunk_bytes(rows) + _QUEUE_BYTES),
        residual=residual,
    )
