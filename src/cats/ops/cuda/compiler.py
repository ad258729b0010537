"""Compile CUDA C++ through NVRTC, with a cache on disk: needs no installed compiler, and no GPU."""

import hashlib
import warnings
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from cuda.bindings import nvrtc

from cats.errors import BackendError, StorageError
from cats.storage import cache_directory, replacing

__all__ = ["architecture", "compile_kernel", "supported_architectures"]

_DIGEST_BYTES = hashlib.sha256().digest_size


def architecture(capability: tuple[int, int]) -> int:
    """The number that NVRTC uses for a compute capability: 90 for ``(9, 0)``."""
    major, minor = capability
    return 10 * major + minor


@cache
def supported_architectures() -> frozenset[int]:
    """The architectures that the installed NVRTC compiles for."""
    return frozenset(_check(nvrtc.nvrtcGetSupportedArchs()))


def compile_kernel(name: str, defines: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """Machine code of a source file for one GPU generation, from disk if compiled before.

    Args:
        name: Source file under ``cats/ops``, such as ``linear/linear.cu``.
        defines: Macros of the source.
        capability: Compute capability, such as ``(9, 0)``.

    Returns:
        A cubin.

    Raises:
        BackendError: If NVRTC rejects the source; the message holds its log.
    """
    source, headers = _sources(name)
    options = [
        f"--gpu-architecture=sm_{architecture(capability)}",
        "--std=c++17",
        *(f"-D{macro}={value}" for macro, value in sorted(defines.items())),
    ]
    version = _check(nvrtc.nvrtcVersion())
    key = hashlib.sha256(repr((source, headers, options, version)).encode()).hexdigest()
    path = cache_directory() / "cuda" / f"{key}.cubin"
    code = _read(path)
    if code is None:
        code = _compile(name, source, headers, options)
        _write(path, code)
    return code


@cache
def _sources(name: str) -> tuple[bytes, dict[str, bytes]]:
    """A source file, and the headers that it may include: those of its folder and of this one."""
    ops = resources.files("cats.ops")
    folders = (ops / "cuda", ops / str(PurePosixPath(name).parent))
    headers = [
        file for folder in folders for file in folder.iterdir() if file.name.endswith(".cuh")
    ]
    headers.sort(key=lambda file: file.name)
    return (ops / name).read_bytes(), {file.name: file.read_bytes() for file in headers}


def _compile(name: str, source: bytes, headers: dict[str, bytes], options: list[str]) -> bytes:
    names = [header.encode() for header in headers]
    program = _check(
        nvrtc.nvrtcCreateProgram(source, name.encode(), len(headers), list(headers.values()), names)
    )
    try:
        encoded = [option.encode() for option in options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_check(nvrtc.nvrtcGetProgramLogSize(program)))
            _check(nvrtc.nvrtcGetProgramLog(program, log))
            text = log.decode(errors="replace").rstrip("\0")
            raise BackendError(f"{name} does not compile with {' '.join(options)}:\n{text}")
        code = bytearray(_check(nvrtc.nvrtcGetCUBINSize(program)))
        _check(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(code)


def _read(path: Path) -> bytes | None:
    """The code in a cache entry; None where there is no entry, or it is damaged."""
    try:
        entry = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    digest, code = entry[:_DIGEST_BYTES], entry[_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """Write a cache entry whole or not at all: other processes may write the same entry."""
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(hashlib.sha256(code).digest() + code)
    except StorageError as error:
        warnings.warn(
            f"CUDA kernels are compiled again in each process: {error}. "
            "Set CATS_CACHE_DIR to a folder that can be written",
            stacklevel=2,
        )


def _check(result: tuple[Any, ...]) -> Any:
    """The value of an NVRTC call, which returns its status first."""
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BackendError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
    return values[0] if len(values) == 1 else tuple(values)
