"""The fast path of ``cats::gated_mlp`` on NVIDIA GPUs: one launch of run-time compiled CUDA C++.

``gated_mlp.cu`` is the kernel, ``arguments.py`` its struct, ``variant.py`` chooses what it is
specialised for. ``launch.py`` launches it as the operator, ``residual.py`` as a part of a token.
"""

from collections.abc import Callable

from torch import Tensor

from cats.ops.cuda import unavailable
from cats.ops.cuda.device import VECTOR_BYTES, shared_memory
from cats.ops.mlp.arguments import GatedMLPArguments
from cats.ops.mlp.cuda.variant import MAX_BATCH, variant_for

__all__ = ["gated_mlp", "refuses", "unavailable"]


def __getattr__(name: str) -> Callable[[GatedMLPArguments], Tensor]:
    # imports optional packages, whose absence `unavailable` reports; once, not in each call
    if name == "gated_mlp":
        from cats.ops.mlp.cuda import launch

        return launch.gated_mlp
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def refuses(arguments: GatedMLPArguments) -> str | None:
    """Why the backend leaves this call to another one, or None where it takes it."""
    x, gate, up, down = arguments[:4]
    batch, hidden = x.shape
    if not 1 <= batch <= MAX_BATCH:
        return f"takes 1 to {MAX_BATCH} tokens, got {batch}"
    row = hidden * x.element_size()
    if row == 0 or row % VECTOR_BYTES:
        return f"rows must be a multiple of {VECTOR_BYTES} bytes, got {row}"
    if any(t.data_ptr() % VECTOR_BYTES for t in (x, gate, up, down)):
        return f"tensors must begin at a multiple of {VECTOR_BYTES} bytes"
    if arguments.input_thresholds is not None:
        return "it does not skip inputs of the router"
    if not x.is_cuda:
        return f"expected tensors on an NVIDIA GPU, got {x.device}"
    limit = shared_memory(x.device.index)
    if variant_for(hidden, x.dtype, batch, "silu", shared_limit=limit) is None:
        return f"rows of {row} bytes are too long for {limit} bytes of shared memory"
    return None
