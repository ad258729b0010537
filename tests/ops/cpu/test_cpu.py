"""What the CPU kernels share: the library, its build and its instruction sets."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cats
from cats.errors import BackendError
from cats.ops import cpu
from tests.ops.cases import needs_cpu_kernels

SOURCES = Path(cpu.__file__).parent
REPOSITORY = Path(__file__).parents[3]

needs_source = pytest.mark.skipif(
    not (REPOSITORY / "setup.py").exists() or not shutil.which("g++"),
    reason="needs the repository and g++",
)


@needs_cpu_kernels
def test_unknown_instruction_set_is_an_error():
    with pytest.raises(BackendError, match=r"expected one of .*generic, got 'mmx'"):
        cpu.select("mmx")


@needs_source
def test_restated_declarations_agree_with_torch_headers(tmp_path):
    include = Path(torch.__file__).parent / "include"
    if not (include / "torch/csrc/stable/c/shim.h").exists():
        pytest.skip("this torch has no headers")
    ours = (SOURCES / "torch_abi.h").read_text()
    # the handles are torch's own here, so that the compiler compares every declaration
    ours = re.sub(r"^(struct|using) .*;.*\n", "", ours, flags=re.MULTILINE)
    ours = ours.replace("BoxedKernel", "void (*)(StableIValue*, uint64_t, uint64_t)")
    source = tmp_path / "both.cpp"
    source.write_text(
        "#include <torch/csrc/stable/c/shim.h>\n"
        + ours
        + "static_assert(kTorchVersion == TORCH_VERSION_2_10_0);\n"
        + "static_assert(sizeof(StableIValue) == 8);\n"
    )
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{include}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_source
def test_failed_build_leaves_a_working_install_that_says_why(tmp_path):
    broken = tmp_path / "compiler"
    broken.write_text("#!/bin/sh\necho 'error: no such instruction'; exit 1\n")
    broken.chmod(0o755)
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={tmp_path}/lib"]
    command += [f"--build-temp={tmp_path}/temp"]
    environment = os.environ | {"CC": str(broken), "CXX": str(broken)}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    assert "the CPU kernels are left out" in done.stdout + done.stderr
    message = tmp_path / "lib/cats/ops/cpu/build_error.txt"
    assert "no such instruction" in message.read_text()

    package = tmp_path / "cats"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(cats.__file__).parent, package, ignore=ignore)
    shutil.copy(message, package / "ops/cpu")
    program = "from cats import ops; print(ops.backends()['cpu'])"
    shown = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "the build failed" in shown.stdout
    assert "no such instruction" in shown.stdout
