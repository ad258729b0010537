"""What all CUDA kernels share; the kernels themselves lie in the folders of their operators.

A kernel is a file of CUDA C++ that is compiled on first use. ``compiler.py`` compiles it through
NVRTC and keeps the result on disk, ``function.py`` loads and launches it, ``arguments.py`` is the
struct that a launch passes, ``workspace.py`` holds the sums that blocks share, and ``device.py``
says what a GPU has. Of the headers, ``primitives.cuh`` and ``hardware.cuh`` hold what differs
between types of weights and generations of GPUs. docs/kernels.md explains layouts and traffic.
"""

import torch

__all__ = ["unavailable"]


def unavailable() -> str | None:
    """Why no kernel can run on this machine, or None where they can."""
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
