"""What all CPU kernels share: C++ on torch's stable ABI, in torch's own threads.

The kernels lie in the folders of their operators and are one library. They are registered with
torch for CPU tensors, so calls of their operators reach them without Python. ``pip install``
compiles them. If that fails, :func:`unavailable` gives the compiler's message.
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


def unavailable() -> str | None:
    """Why the kernels cannot run: the compiler's message, or that of the loader."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def refuses_operands(x: Tensor, *others: Tensor) -> str | None:
    """Why no kernel takes tensors of these devices, dtypes and layouts, or None."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"expected float32 or bfloat16, got {x.dtype}"
    for tensor in (x, *others):
        if tensor.device.type != "cpu" or tensor.dtype != x.dtype or not tensor.is_contiguous():
            return f"expected contiguous {x.dtype} on the CPU, got {tensor.dtype}"
    return None


def instruction_sets() -> list[str]:
    """The instruction sets that kernels exist for and this processor has, the best one first."""
    kernels = library()
    names: list[str] = []
    while name := kernels.cats_instruction_set(len(names)):
        names.append(name.decode())
    return names


def instruction_set() -> str:
    name: bytes = library().cats_selected()
    return name.decode()


def select(instruction_set: str) -> None:
    """Use another instruction set in this whole process: for tests and measurements.

    Raises:
        BackendError: If this processor does not have it, or the kernels are not built.
    """
    if not library().cats_select(instruction_set.encode()):
        raise BackendError(
            f"expected one of {', '.join(instruction_sets())}, got {instruction_set!r}"
        )


def library() -> ctypes.CDLL:
    """The loaded library, whose operators are registered with torch.

    Raises:
        BackendError: If there is none.
    """
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
