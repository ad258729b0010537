"""Run our CUDA kernels on a CPU: the same sources, with other functions for what is written in PTX.

It shows errors of indices, sums, handshakes and ends of loops, without a GPU. It does not show
races, missing fences or speed.
"""

import ctypes
import hashlib
import importlib
import importlib.util
import platform
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cats.ops

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
_RUNS_HERE = COMPILER and platform.machine() == "x86_64" and platform.system() == "Linux"
needs_emulator = [
    pytest.mark.skipif(not _RUNS_HERE, reason="the emulator of CUDA needs g++ on x86-64 Linux"),
    pytest.mark.skipif(
        importlib.util.find_spec("cuda") is None, reason="cuda-bindings is not installed"
    ),
]
_LAUNCHING = [
    "attention.cuda",
    "attention.rows",
    "choice.cuda",
    "choice.rows",
    "embedding.cuda",
    "embedding.rows",
    "linear.cuda",
    "linear.quantised",
    "linear.rows",
    "mlp.cuda.launch",
    "mlp.cuda.quantised",
    "mlp.cuda.residual",
    "mlp.cuda.rows",
    "rms_norm.rows",
]
_SHARED = "extern __shared__ __align__(128) char memory[];"
_ENTRY = """
extern "C" const char* emulate(const void* arguments, unsigned blocks, unsigned columns,
                               unsigned threads, unsigned shared_bytes) {{
    Arguments a;
    std::memcpy(&a, arguments, sizeof a);
    return run_grid(blocks, columns, threads, shared_bytes, [&] {{ {name}(a); }});
}}
extern "C" unsigned long size_of_arguments() {{ return sizeof(Arguments); }}
"""


def imagine_gpu(monkeypatch, *, multiprocessors, shared_bytes):
    """Let torch describe such a GPU instead of the real one, if any."""
    properties = SimpleNamespace(
        multi_processor_count=multiprocessors, shared_memory_per_block_optin=shared_bytes
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


@contextmanager
def emulated_kernels(monkeypatch):
    """Run every launch here, on an imaginary GPU that :func:`imagine_gpu` describes."""
    modules = [importlib.import_module(f"cats.ops.{name}") for name in _LAUNCHING]
    loaded = [f for module in modules for f in vars(module).values() if hasattr(f, "cache_clear")]
    for module in modules:
        monkeypatch.setattr(module, "Function", EmulatedFunction)
    for function in loaded:
        function.cache_clear()
    yield
    for function in loaded:
        function.cache_clear()


class EmulatedFunction:
    """Runs launches at once, instead of :class:`cats.ops.cuda.function.Function`."""

    handle = 0

    def __init__(self, device, source, defines, *, threads, shared_bytes):
        self._source, self.defines = source, defines
        self.threads, self.shared_bytes = threads, shared_bytes
        self._library = _compile(source, tuple(sorted(defines.items())))

    def launch(self, arguments, *, blocks, stream, dependent, columns=1):
        assert ctypes.sizeof(arguments) == self._library.size_of_arguments()
        error = self._library.emulate(
            ctypes.byref(arguments), blocks, columns, self.threads, self.shared_bytes
        )
        if error:
            raise AssertionError(f"{self._source}: {error.decode()}")


@cache
def _compile(source, defines):
    ops = Path(cats.ops.__file__).parent
    kernel = ops / source
    headers = [*(ops / "cuda").glob("*.cuh"), *kernel.parent.glob("*.cuh")]
    texts = {
        file.name: file.read_text().replace(_SHARED, "char* memory = dynamic_shared;")
        for file in [kernel, *headers]
    }
    texts |= {file.name: file.read_text() for file in HERE.glob("*.*h")}
    name = Path(source).stem
    texts["main.cpp"] = f'#include "builtins.h"\n#include "{name}.cu"\n' + _ENTRY.format(name=name)
    key = hashlib.sha256(repr((texts, defines)).encode()).hexdigest()[:20]
    library = Path(tempfile.gettempdir()) / f"cats-emulator-{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory() as folder:
            for file, text in texts.items():
                (Path(folder) / file).write_text(text)
            macros = [f"-D{macro}={value}" for macro, value in defines]
            main, output = Path(folder) / "main.cpp", Path(folder) / "kernel.so"
            options = ["-std=c++17", "-O1", "-mf16c", "-w", "-shared", "-fPIC"]
            command = [COMPILER, *options, *macros, "-x", "c++", main, "-o", output]
            run = subprocess.run(command, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr[:3000]
            shutil.move(output, library)
    loaded = ctypes.CDLL(str(library))
    loaded.emulate.restype = ctypes.c_char_p
    loaded.size_of_arguments.restype = ctypes.c_ulong
    return loaded
