"""The CPU backend: C++ on torch's stable ABI, in torch's own threads.

The kernels are registered with torch for CPU tensors, so calls of their operators reach them
without Python. They are compiled by ``pip install``; where that failed, the compiler's message is
the reason that :func:`unavailable` gives.
"""

import ctypes
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from cats.errors import BackendError

MAX_BATCH = 8
_FOLDER = Path(__file__).parent
_LIBRARY = _FOLDER / ("kernels.dll" if sys.platform == "win32" else "kernels.so")
_BUILD_ERROR = _FOLDER / "build_error.txt"
_TORCH_LIBRARY = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}


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
    out: Tensor = torch.ops.cats.gated_mlp(
        x, gate, up, down, thresholds, activation, router,
        gate_bias, up_bias, down_bias, product_thresholds, "cpu",
    )  # fmt: skip
    return out


def unavailable() -> str | None:
    """Why the kernels cannot run: the compiler's message, or that of the loader."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def refuses(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> str | None:
    """Why a call is left to ``dense``; ``is_taken`` in gated_mlp.cpp says the same."""
    if x.device.type != "cpu":
        return f"expected CPU tensors, got {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"expected float32 or bfloat16, got {x.dtype}"
    if not 1 <= x.shape[0] <= MAX_BATCH:
        return f"expected a batch of 1 to {MAX_BATCH}, got {x.shape[0]}"
    if gate.numel() == 0:
        return "expected at least one neuron and one input"
    return None


def linear_refuses(x: Tensor, weight: Tensor) -> str | None:
    """Why ``cats::linear`` leaves a call to torch; ``tokens_of`` in linear.cpp says the same."""
    if weight.dim() != 2 or weight.numel() == 0:
        return f"expected a matrix, got {list(weight.shape)}"
    if not 1 <= x.numel() // weight.shape[1] <= MAX_BATCH:
        return f"expected 1 to {MAX_BATCH} tokens, got {list(x.shape)}"
    return _refuses_operands(x, weight)


def norm_refuses(x: Tensor, weight: Tensor) -> str | None:
    """Why the kernel of ``cats::rms_norm`` cannot run a call."""
    if weight.shape != x.shape[-1:] or weight.numel() == 0:
        return f"expected a weight of {list(x.shape[-1:])}, got {list(weight.shape)}"
    return _refuses_operands(x, weight)


def rotary_refuses(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """Why the kernel of ``cats::rotary`` cannot run a call."""
    if x.dim() != 4 or x.shape[-1] % 2 or x.numel() == 0:
        return f"expected [B, heads, T, even], got {list(x.shape)}"
    expected = [x.shape[0], 1, *x.shape[2:]]
    if cos.shape != sin.shape or list(cos.shape) not in (expected, [1, *expected[1:]]):
        return f"expected angles of {expected}, got {list(cos.shape)} and {list(sin.shape)}"
    return _refuses_operands(x, cos, sin)


def _refuses_operands(x: Tensor, *others: Tensor) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"expected float32 or bfloat16, got {x.dtype}"
    for tensor in (x, *others):
        if tensor.device.type != "cpu" or tensor.dtype != x.dtype or not tensor.is_contiguous():
            return f"expected contiguous {x.dtype} on the CPU, got {tensor.dtype}"
    return None


def instruction_sets() -> list[str]:
    """The instruction sets that this processor has kernels for, the best (the one in use) first."""
    library = _library()
    names: list[str] = []
    while name := library.cats_instruction_set(len(names)):
        names.append(name.decode())
    return names


def instruction_set() -> str:
    """The instruction set in use."""
    name: bytes = _library().cats_selected()
    return name.decode()


def select(instruction_set: str) -> None:
    """Use another instruction set in this whole process: for tests and measurements.

    Raises:
        BackendError: If this processor does not have it, or the kernels are not built.
    """
    if not _library().cats_select(instruction_set.encode()):
        raise BackendError(
            f"expected one of {', '.join(instruction_sets())}, got {instruction_set!r}"
        )


def _library() -> ctypes.CDLL:
    loaded = _load()
    if isinstance(loaded, str):
        raise BackendError(f"the CPU kernels are not available: {loaded}")
    return loaded


@cache
def _load() -> ctypes.CDLL | str:
    """The library, registered with torch, or why there is none."""
    if not _LIBRARY.exists():
        if _BUILD_ERROR.exists():
            return f"the build failed: {_BUILD_ERROR.read_text(encoding='utf-8').strip()}"
        return "not built: install from source with a C++ compiler, or from a wheel"
    try:
        library = ctypes.CDLL(str(_LIBRARY))
    except OSError as error:
        return f"cannot load {_LIBRARY.name}: {error}"
    library.cats_register.restype = ctypes.c_char_p
    library.cats_instruction_set.restype = ctypes.c_char_p
    library.cats_selected.restype = ctypes.c_char_p
    torch_library = Path(torch.__file__).parent / "lib"
    torch_library /= _TORCH_LIBRARY.get(sys.platform, "libtorch_cpu.so")
    refusal: bytes | None = library.cats_register(str(torch_library).encode())
    return refusal.decode() if refusal else library
