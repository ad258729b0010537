"""Portable GPU backend: a persistent Triton kernel streams the weights, a second one adds sums.

Deterministic by construction: which program takes which neurons is fixed, and the partial sums of
the programs are added in a fixed order. The workspace belongs to one call and comes from torch's
allocator, so calls on several streams, devices and graphs share nothing.
"""

import importlib.util

import torch
from torch import Tensor

from cats.ops.mlp.arguments import GatedMLPArguments

# With more tokens, nearly every neuron is kept by one of them, and dense GEMMs are faster.
MAX_BATCH = 8
# A row of weights is one block of Triton, of at most this many elements.
MAX_HIDDEN_SIZE = 2**16


def unavailable() -> str | None:
    """Why it cannot run on this machine, or None. Triton's interpreter runs it on a CPU."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if is_interpreted():
        return None
    if not torch.cuda.is_available():
        return "no GPU (on a CPU it runs, slowly, with TRITON_INTERPRET=1)"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "Triton needs a GPU of compute capability 8.0 or newer"
    return None


def refuses(arguments: GatedMLPArguments) -> str | None:
    """Why it leaves this call to another backend, or None."""
    x, gate = arguments.x, arguments.gate
    if x.device.type != "cuda" and not is_interpreted():
        return f"it needs tensors on a GPU, these are on {x.device}"
    if gate.numel() == 0 or x.numel() == 0:
        return "a tensor is empty"
    if x.shape[0] > MAX_BATCH:
        return f"the batch {x.shape[0]} is larger than {MAX_BATCH}"
    if gate.shape[-1] > MAX_HIDDEN_SIZE:
        return f"the hidden size {gate.shape[-1]} is larger than {MAX_HIDDEN_SIZE}"
    return None


def gated_mlp(arguments: GatedMLPArguments) -> Tensor:
    """See :func:`cats.ops.gated_mlp`. Two launches, three where the router drops inputs."""
    from cats.ops.mlp.triton import launch

    return launch.gated_mlp(arguments)


def is_interpreted() -> bool:
    import triton  # type: ignore[import-untyped]

    return bool(triton.knobs.runtime.interpret)
