"""Measured numbers in JSON lines: a result is one number with its settings and environment."""

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from cats.errors import DataError, FormatError, StorageError
from cats.version import __version__

__all__ = [
    "COMPARED", "MEAN", "Result", "append_results", "environment", "join_results", "place",
    "read_results", "run_of",
]  # fmt: skip

# Methods whose quality is compared, in the order of tables.
COMPARED = ("dense", "cats", "relu", "input", "teal")
# In the place of a task: the mean over the tasks.
MEAN = "mean"
# Fractions that are asked for, and whole numbers that are found.
_TARGETS = ("sparsity", "target_sparsity")
_COUNTS = ("bytes", "token_bytes", "copies", "calls", "compilations")
_VERSION = 1
_PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "peft", "cuda-bindings", "nvidia-cuda-nvrtc",
)  # fmt: skip
_Value = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One measured number.

    ``value`` is a median in ``unit``; ``low`` and ``high`` are the quartiles of the ``samples``
    it was taken from. ``settings`` say what was measured, ``environment`` where.
    """

    benchmark: str
    quantity: str
    value: float
    unit: str
    low: float
    high: float
    samples: int
    settings: dict[str, _Value]
    environment: dict[str, _Value]

    def to_json(self) -> str:
        return json.dumps({"version": _VERSION, **dataclasses.asdict(self)}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> "Result":
        """
        Raises:
            FormatError: If the line is no result, or one of a newer release.
        """
        try:
            fields: dict[str, Any] = json.loads(line)
            version = fields.pop("version")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise FormatError(f"not a result: {line[:80]!r}") from error
        if version != _VERSION:
            raise FormatError(f"a result of format {version}; this release reads {_VERSION}")
        if "kind" in fields:
            raise FormatError(f"not a result, but part of a file of kind {fields['kind']}")
        try:
            return cls(**fields)
        except TypeError as error:
            raise FormatError(f"not a result: {error}") from error


def append_results(path: Path, results: Iterable[Result]) -> None:
    """Append one line a result, all of them in one write, so that no reader sees half a line.

    Raises:
        StorageError: If the file cannot be written.
    """
    data = "".join(result.to_json() + "\n" for result in results).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = os.write(file, data)
        finally:
            os.close(file)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from error
    if written != len(data):
        raise StorageError(f"{path}: only {written} of {len(data)} bytes were written")


def read_results(path: Path) -> list[Result]:
    """All results of a file, in order.

    Raises:
        StorageError: If the file cannot be read.
        FormatError: If a line is no result; the message names it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
    results = []
    for number, line in enumerate(lines, start=1):
        try:
            results.append(Result.from_json(line))
        except FormatError as error:
            raise FormatError(f"{path}, line {number}: {error}") from error
    return results


def run_of(result: Result) -> str:
    """What tells the run of a result from others: device, commit, time and all else of it.

    Only results of one run are compared as speeds: those of another may come from another machine
    of the same name.
    """
    return json.dumps(result.environment, sort_keys=True)


def join_results(paths: Iterable[Path]) -> list[Result]:
    """The results of several files, run by run, each once.

    Every result keeps its environment, which says of which run it is. The runs keep their order,
    and so do the results of a run.

    Raises:
        StorageError: If a file cannot be read.
        FormatError: If a line is no result.
        DataError: If two results of one run and the same settings differ, or if there is none.
    """
    runs: dict[str, dict[str, Result]] = {}
    for path in paths:
        for result in read_results(path):
            found = runs.setdefault(run_of(result), {})
            key = json.dumps([result.benchmark, result.quantity, _measured(result)], sort_keys=True)
            if found.setdefault(key, result) != result:
                raise DataError(
                    f"{path}: holds another {result.quantity} of {result.benchmark} than a file "
                    f"before it, of the same run and settings: {result.settings}"
                )
    if not runs:
        raise DataError("no results in these files")
    return [result for found in runs.values() for result in found.values()]


def _measured(result: Result) -> dict[str, _Value]:
    """The settings that say what was measured: without those that were found along with it."""
    return {
        name: value
        for name, value in result.settings.items()
        if name in _TARGETS or not (isinstance(value, float) or name in _COUNTS)
    }


def place(result: Result) -> tuple[int, float]:
    """What results of quality are sorted by: the method, then its target."""
    settings = result.settings
    return COMPARED.index(str(settings["method"])), float(settings["target_sparsity"] or 0)


def environment(device: str, *, commit: str | None = None) -> dict[str, _Value]:
    """What the numbers of this process depend on.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        commit: Of the sources, where they are no checkout that could tell it.
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
        "commit": commit or _commit(),
        "kernel_sources": kernel_source_hash(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def kernel_source_hash() -> str:
    """SHA-256 over the sources of every operator: the same hash means the same kernels."""
    folder = Path(__file__).parent / "ops"
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
def _commit() -> str | None:
    """Commit of the source tree, with ``-dirty`` where it was changed; None outside a checkout.

    ``CATS_COMMIT`` names it where the sources were copied from a checkout.
    """
    if named := os.environ.get("CATS_COMMIT"):
        return named
    root = Path(__file__).parent
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        run = subprocess.run(describe, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()
