"""Only the optional C++ kernels of ``cats.ops``; the rest is in pyproject.toml.

They use torch's stable C interface by name, so building them needs a C++17 compiler and no torch.
A build that fails leaves a working install: the compiler's message goes into the package, and
``cats.ops.backends()`` shows it.
"""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

FOLDER = Path("src/cats/ops")
# a universal build for macOS has one set of options for both processors
IS_UNIVERSAL = "arm64" in os.environ.get("ARCHFLAGS", "")
IS_X86 = platform.machine().lower() in ("x86_64", "amd64") and not IS_UNIVERSAL
# what the kernels gain from -O3, in two thirds of its time
OPTIONS = ["-O2", "-fpeel-loops", "-ftree-vectorize", "-fno-math-errno"]
OPTIONS += ["-std=c++17", "-g0", "-fvisibility=hidden", "-pthread"]
MSVC_OPTIONS = ["/O2", "/std:c++17"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
# Each source to the compiler options of its instruction set, for GCC and Clang, and for MSVC.
SOURCES = {
    "cpu/library.cpp": ([], []),
    "mlp/cpu/gated_mlp.cpp": ([], []),
    "linear/linear.cpp": ([], []),
    "packed_linear/packed_linear.cpp": ([], []),
    "packed_mlp/packed_mlp.cpp": ([], []),
    # each operation rounds: no product and sum in one, whatever the processor has
    "packed_linear/dequantise.cpp": (["-ffp-contract=off"], ["/fp:precise"]),
    "packed_mlp/dequantise.cpp": (["-ffp-contract=off"], ["/fp:precise"]),
    "rms_norm/rms_norm.cpp": ([], []),
    "rotary/rotary.cpp": ([], []),
    "step/plan.cpp": ([], []),
    "step/step.cpp": ([], []),
    "step/team.cpp": ([], []),
    "cpu/generic.cpp": ([], []),
    "step/generic.cpp": ([], []),
}
if IS_X86:
    SOURCES |= {
        "cpu/library.cpp": (["-DCATS_X86"], ["/DCATS_X86"]),
        "cpu/avx2.cpp": (["-mavx2", "-mfma"], ["/arch:AVX2"]),
        "cpu/avx512.cpp": (AVX512, ["/arch:AVX512"]),
        "cpu/avx512_bf16.cpp": ([*AVX512, "-mavx512bf16"], ["/arch:AVX512"]),
        "step/avx2.cpp": (["-mavx2", "-mfma"], ["/arch:AVX2"]),
        "step/avx512.cpp": (AVX512, ["/arch:AVX512"]),
        "step/avx512_vnni.cpp": ([*AVX512, "-mavx512vnni"], ["/arch:AVX512"]),
        "step/avx512_bf16.cpp": ([*AVX512, "-mavx512vnni", "-mavx512bf16"], ["/arch:AVX512"]),
    }


class BuildKernels(build_ext):
    """Compiles each source for its instruction set, into a library that is not a Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + (".dll" if sys.platform == "win32" else ".so")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # the sources mark what they export

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        build_error = target.with_name("build_error.txt")
        build_error.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._compile(ext, target)
        except (CCompilerError, ExecError, PlatformError, OSError) as error:
            target.unlink(missing_ok=True)
            build_error.write_text(f"{error}\n", encoding="utf-8")
            self.warn(f"the CPU kernels are left out: {error}")

    def _compile(self, ext: Extension, target: Path) -> None:
        is_msvc = self.compiler.compiler_type == "msvc"
        if not is_msvc:
            # the name depends on the version of setuptools
            self.compiler.spawn = self.compiler.call = run_compiler
        common = MSVC_OPTIONS if is_msvc else OPTIONS

        def compile_one(source: str) -> list[str]:
            options = [*common, *SOURCES[Path(source).relative_to(FOLDER).as_posix()][is_msvc]]
            return self.compiler.compile(
                [source], output_dir=self.build_temp, include_dirs=ext.include_dirs,
                extra_postargs=options, depends=ext.depends,
            )  # fmt: skip

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [name for names in pool.map(compile_one, ext.sources) for name in names]
        link = [] if is_msvc else ["-pthread"]
        self.compiler.link_shared_object(
            objects, str(target), target_lang="c++", extra_postargs=link
        )


class PlatformWheel(bdist_wheel):
    """The library does not use Python's C interface: one wheel serves every Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def run_compiler(command: list[str], **_: object) -> None:
    """Run a compiler, and raise its own message where it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise CCompilerError(f"{' '.join(command)}\n{done.stdout}")


setup(
    ext_modules=[
        Extension(
            "cats.ops.cpu.kernels",
            [str(FOLDER / name) for name in SOURCES],
            # sources name each other from there: "mlp/cpu/gated_mlp.h"
            include_dirs=[str(FOLDER)],
            depends=[str(path) for path in sorted(FOLDER.rglob("*.h"))],
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
