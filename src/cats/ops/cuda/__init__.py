"""The fast path of ``cats::gated_mlp`` on NVIDIA GPUs: one launch of run-time compiled CUDA C++.

``gated_mlp.cu`` is the kernel, ``primitives.cuh`` what differs between GPU generations and weight
types. ``variant.py`` chooses what a kernel is specialised for, ``compiler.py`` compiles it through
NVRTC and keeps the result on disk, ``kernel.py`` loads and launches it, ``workspace.py`` holds the
sums that blocks share. Layouts, traffic and what was tried: docs/kernels.md.
"""

import torch
from torch import Tensor

from cats.ops.cuda.variant import MAX_BATCH, VECTOR_BYTES, shared_memory, variant_for

__all__ = ["gated_mlp", "refuses", "unavailable"]


def gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    thresholds: Tensor,
    activation: str,
    router: str = "gate",
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    product_thresholds: Tensor | None = None,
) -> Tensor:
    """See :func:`cats.ops.gated_mlp`."""
    # needs the optional packages, whose absence `unavailable` reports
    from cats.ops.cuda import kernel

    first, second = (gate, gate_bias), (up, up_bias)
    if router == "up":
        first, second = second, first
    return kernel.launch(
        x, *first, *second, down, down_bias, thresholds, product_thresholds,
        activation=activation, gate_is_router=router == "gate",
    )  # fmt: skip


def unavailable() -> str | None:
    """Why the backend cannot run on this machine, or None where it can."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "no NVIDIA GPU that PyTorch can use"
    try:
        from cats.ops.cuda import compiler
    except ImportError as error:
        return f"{error}: pip install 'cats-llm[cuda]'"
    capability = torch.cuda.get_device_capability()
    try:
        supported = compiler.supported_architectures()
    except RuntimeError as error:
        return f"NVRTC does not load ({error}): pip install 'cats-llm[cuda]'"
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if compiler.architecture(capability) not in supported:
        return f"NVRTC does not know compute capability {capability[0]}.{capability[1]}: update it"
    return None


def refuses(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> str | None:
    """Why the backend leaves this call to another one, or None where it takes it."""
    if not x.is_cuda:
        return f"expected tensors on an NVIDIA GPU, got {x.device}"
    batch, hidden = x.shape
    if not 1 <= batch <= MAX_BATCH:
        return f"takes 1 to {MAX_BATCH} tokens, got {batch}"
    row = hidden * x.element_size()
    if row == 0 or row % VECTOR_BYTES:
        return f"rows must be a multiple of {VECTOR_BYTES} bytes, got {row}"
    if any(t.data_ptr() % VECTOR_BYTES for t in (x, gate, up, down)):
        return f"tensors must begin at a multiple of {VECTOR_BYTES} bytes"
    limit = shared_memory(x.device.index)
    if variant_for(hidden, x.dtype, batch, "silu", shared_limit=limit) is None:
        return f"rows of {row} bytes are too long for {limit} bytes of shared memory"
    return None
