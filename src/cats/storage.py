"""Safetensors files that are whole or absent, and errors that say what is wrong with one."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from cats.errors import FormatError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
_METADATA_KEY = "cats"


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write one safetensors file with a JSON block under the metadata key ``cats``.

    The file appears under its name only when it is complete.

    Raises:
        StorageError: If it cannot be written; nothing is left behind.
    """
    # imported here: files without tensors need no torch
    import safetensors.torch

    block = {"version": FORMAT_VERSION, **metadata}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(contiguous, {_METADATA_KEY: json.dumps(block)})
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote: the tensors and the checked ``cats`` block.

    Raises:
        StorageError: If there is no such file or it cannot be read.
        FormatError: If it is no safetensors file, is truncated, or comes from a newer release.
    """
    if Path(path).is_dir():
        raise StorageError(f"{path}: is a folder, expected a file")
    if not Path(path).is_file():
        raise StorageError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise FormatError(
            f"{path}: not a whole safetensors file ({error}); make it again with cats calibrate"
        ) from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error}") from error
    if _METADATA_KEY not in metadata:
        raise FormatError(f"{path}: a safetensors file, but not one that cats wrote")
    try:
        block = json.loads(metadata[_METADATA_KEY])
    except json.JSONDecodeError as error:
        raise FormatError(f"{path}: its cats block is not valid JSON ({error})") from error
    check_version(block, str(path))
    return tensors, block


def save_json(path: str | Path, kind: str, block: dict[str, Any]) -> None:
    """Write one JSON document of a kind, with its format version; it is whole or absent.

    Raises:
        StorageError: If it cannot be written; nothing is left behind.
    """
    text = json.dumps({"version": FORMAT_VERSION, "kind": kind, **block}, indent=1)
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def load_json(path: str | Path, kind: str) -> dict[str, Any]:
    """Read what :func:`save_json` wrote.

    Raises:
        StorageError: If it cannot be read.
        FormatError: If it is something else, or comes from a newer release.
    """
    try:
        block = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise FormatError(f"{path}: not a {kind} ({error})") from error
    check_version(block, str(path))
    if block.get("kind") != kind:
        raise FormatError(f"{path}: holds {block.get('kind')}, expected a {kind}")
    return dict(block)


def cache_directory() -> Path:
    """Folder of files that can be made again: ``$CATS_CACHE_DIR``, or ``~/.cache/cats``."""
    if chosen := os.environ.get("CATS_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cats"


def check_version(block: Any, source: str) -> None:
    """Raise FormatError unless ``block`` is a mapping with a format version that is read here."""
    version = block.get("version") if isinstance(block, dict) else None
    if not isinstance(version, int):
        raise FormatError(f"{source}: its cats block has no format version")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{source}: format version {version}, this release reads {FORMAT_VERSION}; "
            "upgrade with pip install -U cats-llm"
        )


@contextmanager
def replacing(path: str | Path, *, directory: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, which is renamed to it when the block ends well.

    Args:
        path: The file, or the folder that must not exist or be empty.
        directory: Whether a folder is written.

    Raises:
        StorageError: If writing fails or a folder is in the way.
    """
    path = Path(path)
    if directory and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise StorageError(f"{path}: exists already; choose another name or delete it first")
    if not directory and path.is_dir():
        raise StorageError(f"{path}: is a folder, expected the name of a file")
    # the name is chosen before the file exists, so that Ctrl+C at any time knows what to remove
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if directory:
                temporary.mkdir()
            yield temporary
            os.replace(temporary, path)
        finally:
            if temporary.is_dir():
                shutil.rmtree(temporary)
            else:
                temporary.unlink(missing_ok=True)
    # safetensors reports a full disk as an error of its own kind
    except (OSError, safetensors.SafetensorError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path}: cannot be written: {error}") from error
