"""Write files that are complete or absent; read them, or say what is wrong with them."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from cats.errors import FormatError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
# Thresholds on the inputs of layers have this one, so that releases without them refuse the file.
MASKS_VERSION = 2
_METADATA_KEY = "cats"


def save_tensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: Mapping[str, object]
) -> None:
    """Write one safetensors file with a JSON block under the metadata key ``cats``.

    The file gets its name only when it is complete.

    Raises:
        StorageError: If it cannot be written; then no file is left.
    """
    # imported here, since files without tensors need no torch
    import safetensors.torch

    block = {"version": FORMAT_VERSION, **metadata}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(contiguous, {_METADATA_KEY: json.dumps(block)})
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of :func:`save_tensors`: the tensors and the checked ``cats`` block.

    Raises:
        StorageError: If there is no such file or it cannot be read.
        FormatError: If it is not a safetensors file, is truncated, or is from a newer release.
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
    check_version(block, str(path), MASKS_VERSION)
    return tensors, block


def save_json(path: str | Path, kind: str, block: Mapping[str, object]) -> None:
    """Write one JSON document with its kind and format version.

    The file gets its name only when it is complete.

    Raises:
        StorageError: If it cannot be written; then no file is left.
    """
    text = json.dumps({"version": FORMAT_VERSION, "kind": kind, **block}, indent=1)
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def load_json(path: str | Path, kind: str) -> dict[str, Any]:
    """Read a document of :func:`save_json`.

    Raises:
        StorageError: If it cannot be read.
        FormatError: If it is of another kind, is damaged, or is from a newer release.
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
    """Folder of files that can be made again: ``$CATS_CACHE_DIR`` or ``~/.cache/cats``."""
    if folder := os.environ.get("CATS_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cats"


def check_version(block: object, source: str, newest: int = FORMAT_VERSION) -> None:
    """Raise FormatError unless ``block`` is a mapping with a format version of this release."""
    version = block.get("version") if isinstance(block, dict) else None
    if not isinstance(version, int):
        raise FormatError(f"{source}: its cats block has no format version")
    if not FORMAT_VERSION <= version <= newest:
        release = block.get("release") if isinstance(block, dict) else None
        raise FormatError(
            f"{source}: format version {version}, this release reads up to {newest}; "
            f"{upgrade_advice(release)}"
        )


def upgrade_advice(release: object) -> str:
    """How to get the release that wrote a file; ``release`` is what the file says."""
    if isinstance(release, str) and release.replace(".", "").isalnum():
        return f"upgrade with pip install 'cats-llm>={release}'"
    return "upgrade with pip install -U cats-llm"


@contextmanager
def replacing(path: str | Path, *, directory: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it is renamed to ``path`` if the block succeeds.

    Args:
        path: The file to write, or a folder that is empty or does not exist.
        directory: Whether to write a folder.

    Raises:
        StorageError: If writing fails, or a folder has the name of the file.
    """
    path = Path(path)
    if directory and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise StorageError(f"{path}: exists already; choose another name or delete it first")
    if not directory and path.is_dir():
        raise StorageError(f"{path}: is a folder, expected the name of a file")
    # the name is chosen before the file exists, so that it can be removed after Ctrl+C at any time
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
    # safetensors reports a full disk with its own class of error
    except (OSError, safetensors.SafetensorError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path}: cannot be written: {error}") from error
