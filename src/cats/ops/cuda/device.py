"""What kernels must know of a GPU and of the types of weights."""

import torch

__all__ = ["DTYPES", "VECTOR_BYTES", "multiprocessors", "shared_memory"]

VECTOR_BYTES = 16
"""What a thread loads at once: rows of weights are a multiple of it."""
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""Each dtype to the value of the macro ``DTYPE``."""


def shared_memory(device: int) -> int:
    """Bytes of shared memory that a block may have on a GPU."""
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def multiprocessors(device: int) -> int:
    """How many multiprocessors a GPU has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
