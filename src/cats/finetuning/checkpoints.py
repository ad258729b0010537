"""Checkpoints of a run: found only when they are whole, and renamed before they are deleted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# Checkpoints are written and deleted in this folder, from which nothing resumes.
_UNFINISHED = ".unfinished"


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a folder, oldest first."""
    paths = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdecimal()]
    return sorted(paths, key=step_of)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return next(reversed(checkpoints(folder)), None)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def empty_unfinished(folder: Path) -> None:
    """Delete what a stopped run has left of a checkpoint."""
    shutil.rmtree(unfinished_folder(folder), ignore_errors=True)


def unfinished_folder(folder: Path) -> Path:
    """Where checkpoints are written before they are whole."""
    return folder / _UNFINISHED


def publish(folder: Path, name: str, *, keep: int) -> None:
    """Rename a whole checkpoint to its final name, and delete the oldest ones.

    Args:
        folder: The folder of the run.
        name: Name of the checkpoint, which lies in :func:`unfinished_folder`.
        keep: How many checkpoints remain.
    """
    unfinished = unfinished_folder(folder)
    _flush(unfinished / name)
    if (folder / name).exists():
        (folder / name).rename(unfinished / "replaced")
    (unfinished / name).rename(folder / name)
    for old in checkpoints(folder)[:-keep]:
        # renamed first, so that a checkpoint which is half deleted is not found
        old.rename(unfinished / old.name)
    shutil.rmtree(unfinished)


def _flush(folder: Path) -> None:
    """Wait until the files are on the disk: the rename must not reach it before them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
