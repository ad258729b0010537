"""What the numbers of a process depend on: device, versions, sources."""

import hashlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

from cats.results.result import Value
from cats.version import __version__

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "peft",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
)
_SOURCES = Path(__file__).parents[1]


def environment(device: str, *, commit: str | None = None) -> dict[str, Value]:
    """What the numbers of this process depend on.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        commit: Commit of the sources, where they are not a checkout. The environment variable
            ``CATS_COMMIT`` names it too.
    """
    import torch

    versions = {f"version_{name}": _installed(name) for name in _PACKAGES}
    return {
        "device": _device_name(device),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cats": __version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        **versions,
        "commit": commit or os.environ.get("CATS_COMMIT") or _checkout_commit(),
        "kernel_sources": kernel_source_hash(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def kernel_source_hash() -> str:
    return hash_sources(_SOURCES / "ops")


def hash_sources(folder: Path) -> str:
    """SHA-256 over the sources of the operators in a folder: the same hash, the same kernels."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h"):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: str) -> str:
    import torch

    if device != "cpu":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({os.cpu_count()} cores)"


@cache
def _checkout_commit() -> str | None:
    """Commit of the source tree, with ``-dirty`` where it was changed; None outside a checkout."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        run = subprocess.run(describe, cwd=_SOURCES, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()
