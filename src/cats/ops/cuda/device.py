"""What kernels must know about a GPU and about the types of weights."""

import torch

__all__ = ["DTYPES", "VECTOR_BYTES", "multiprocessors", "shared_memory"]

VECTOR_BYTES = 16
"""What a thread loads at once. Rows of weights are a multiple of it."""
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""Each dtype to the value of the macro ``DTYPE``."""


def shared_memory(device: int) -> int:
    """Largest shared memory of a block on a GPU, in bytes."""
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
