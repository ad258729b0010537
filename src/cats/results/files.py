"""Results in files: JSON lines that are appended, read and put together."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from cats.errors import DataError, FormatError, StorageError
from cats.results.result import Result


def append_results(path: Path, results: Iterable[Result]) -> None:
    """Append one line per result, all of them in one write, so that no reader sees half a line.

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
        FormatError: If a line is no result; the message names the line and the field.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise StorageError(f"{path}: cannot be read ({reason})") from error
    results = []
    for number, line in enumerate(lines, start=1):
        try:
            results.append(Result.from_json(line))
        except FormatError as error:
            raise FormatError(f"{path}, line {number}: {error}") from error
    return results


def run_of(result: Result) -> str:
    """Which run a result is of: its device, commit, time and the rest of its environment.

    Speeds are compared within one run only. Another run may come from another machine of the same
    name.
    """
    return json.dumps(result.environment, sort_keys=True)


def join_results(paths: Iterable[Path]) -> list[Result]:
    """The results of several files, run by run, each once.

    The runs keep their order, and so do the results of a run.

    Raises:
        StorageError: If a file cannot be read.
        FormatError: If a line is no result.
        DataError: If two results of one run and the same settings differ, or if there is none.
    """
    runs: dict[str, dict[str, Result]] = {}
    for path in paths:
        for result in read_results(path):
            of_run = runs.setdefault(run_of(result), {})
            key = json.dumps([result.benchmark, result.quantity, result.measured], sort_keys=True)
            if of_run.setdefault(key, result) != result:
                raise DataError(
                    f"{path}: holds another {result.quantity} of {result.benchmark} than an "
                    f"earlier file, of the same run and settings: {result.settings}"
                )
    if not runs:
        raise DataError("no results in these files")
    return [result for of_run in runs.values() for result in of_run.values()]
