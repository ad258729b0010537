"""Values of options that ``cats evaluate`` and ``cats reproduce`` read and check alike."""

from __future__ import annotations

from pathlib import Path

from cats.cli import options
from cats.errors import ConfigError


def parse_batch_size(text: str) -> int | str:
    """A positive number, or ``"auto"``."""
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--batch-size: expected auto or a positive number, got {text!r}")
    return int(text)


def check_tasks(tasks: str, data_dir: Path | None) -> list[str]:
    """The names of the tasks.

    Raises:
        CatsError: If a task or its file does not exist.
    """
    from cats.evaluation.tasks import check_data, task_names

    with options.err.status("looking up the tasks ..."):
        names = task_names(tasks)
        if data_dir is not None:
            check_data(names, data_dir)
    return names
