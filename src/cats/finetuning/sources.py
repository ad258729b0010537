"""Rows and texts from files and data sets: text, JSON lines, parquet, or a Hugging Face id."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cats.data import read_text
from cats.errors import ConfigError, DataError, StorageError

# The data of the paper: the default text.
REFINEDWEB = "tiiuae/falcon-refinedweb"
_TEXT_COLUMNS = ("text", "content")
_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".gz")


@dataclass(frozen=True, slots=True)
class Source:
    """A file or a data set, or a part of a file.

    Attributes:
        name: Path, or a Hugging Face id ``NAME``, ``NAME:CONFIG`` or ``NAME:CONFIG:SPLIT``.
        start: Where the part begins, as a share of the file.
        end: Where the part ends, as a share of the file.
    """

    name: str
    start: float = 0.0
    end: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Source:
        """``c4.txt.gz``, or a part of it: ``c4.txt.gz[:50%]``, ``c4.txt.gz[50%:]``.

        Raises:
            DataError: If the part cannot be read, or is empty.
        """
        match = re.fullmatch(r"(.+)\[(?:(\d+)%)?:(?:(\d+)%)?\]", text)
        if match is None and re.search(r"\[[^\]]*%[^\]]*\]$", text):
            raise DataError(f"{text}: expected a part such as [:50%] or [50%:]")
        if match is None:
            return cls(text)
        start, end = int(match[2] or 0) / 100, int(match[3] or 100) / 100
        if not 0 <= start < end <= 1:
            raise DataError(f"{text}: expected a part such as [:50%] or [50%:]")
        return cls(match[1], start, end)

    @property
    def is_file(self) -> bool:
        """Whether this names a file, and not a data set.

        Raises:
            StorageError: If it looks like a file that does not exist.
        """
        path = Path(self.name)
        if path.is_file():
            return True
        if path.is_dir():
            raise StorageError(f"{self.name}: is a folder, expected a file")
        if path.suffix in _SUFFIXES or self.name.startswith(("/", ".", "~")):
            raise StorageError(f"{self.name}: no such file")
        return False

    def __str__(self) -> str:
        part = "" if (self.start, self.end) == (0, 1) else f"[{self.start:.0%}:{self.end:.0%}]"
        return (Path(self.name).name if Path(self.name).is_file() else self.name) + part


def read_texts(source: Source, *, column: str | None = None) -> Iterator[str]:
    """The texts of a source; a plain text file is one text.

    Args:
        source: Where they come from; data sets are streamed.
        column: Name of the column with the text; None: ``text`` or ``content``.

    Raises:
        StorageError: If it cannot be read.
        DataError: If there is no text, or no such column.
    """
    if source.is_file and not _has_rows(source):
        yield _part(read_text(source.name), source)
        return
    empty = True
    for number, row in enumerate(_rows(source, stream=True), start=1):
        text_column = column or next((name for name in _TEXT_COLUMNS if name in row), None)
        if text_column is None or text_column not in row:
            expected = column or " or ".join(_TEXT_COLUMNS)
            raise DataError(f"{source}, row {number}: no column {expected}; there are {[*row]}")
        text = row[text_column]
        if not isinstance(text, str):
            raise DataError(f"{source}, row {number}: column {text_column} holds no text")
        empty = empty and not text.strip()
        yield text
    if empty:
        raise DataError(f"{source}: holds no text")


def read_rows(source: Source, columns: Sequence[str]) -> list[dict[str, object]]:
    """The rows of JSON lines, a parquet file or a data set.

    Raises:
        StorageError: If it cannot be read.
        DataError: If there are no rows, or one lacks a column.
    """
    if source.is_file and not _has_rows(source):
        raise DataError(f"{source}: expected rows: .jsonl, .jsonl.gz or .parquet")
    rows = list(_rows(source, stream=False))
    if not rows:
        raise DataError(f"{source}: holds no rows")
    for number, row in enumerate(rows, start=1):
        for column in columns:
            if row.get(column) is None:
                raise DataError(f"{source}, row {number}: no {column}; there are {[*row]}")
    return rows


def _has_rows(source: Source) -> bool:
    return source.name.removesuffix(".gz").endswith((".jsonl", ".json", ".parquet"))


def _part(text: str, source: Source) -> str:
    """The part of a text, cut at ends of lines, so that two parts never share a line."""

    def cut(share: float) -> int:
        if share in (0, 1):
            return round(share * len(text))
        return text.find("\n", int(share * len(text))) + 1 or len(text)

    return text[cut(source.start) : cut(source.end)]


def _rows(source: Source, *, stream: bool) -> Iterator[dict[str, object]]:
    if not source.is_file:
        yield from _dataset(source, stream=stream)
        return
    read = _parquet if source.name.endswith(".parquet") else _json_lines
    rows = read(source.name)
    yield from rows[round(source.start * len(rows)) : round(source.end * len(rows))]


def _json_lines(name: str) -> list[dict[str, object]]:
    rows = []
    try:
        with (gzip.open if name.endswith(".gz") else open)(name, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise DataError(f"{name}, line {number}: expected an object")
                    rows.append(row)
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name}, line {len(rows) + 1}: not JSON in UTF-8 ({error})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise StorageError(f"{name}: cannot be read: {error}") from error
    return rows


def _parquet(name: str) -> list[dict[str, object]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ConfigError("parquet needs pyarrow: pip install 'cats-llm[finetune]'") from error
    try:
        return list(parquet.read_table(name).to_pylist())
    except (OSError, ArrowException) as error:
        raise StorageError(f"{name}: cannot be read: {error}") from error


def _dataset(source: Source, *, stream: bool) -> Iterator[dict[str, object]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            f"{source.name} is no file here, and data sets need their library: "
            "pip install 'cats-llm[finetune]'"
        ) from error
    if (source.start, source.end) != (0, 1):
        raise DataError(f"{source}: parts of data sets are not supported, only of files")
    name, config, split = [*source.name.split(":"), "", ""][:3]
    try:
        yield from load_dataset(name, config or None, split=split or "train", streaming=stream)
    # errors of the hub: no network, no such data set, split or configuration
    except (OSError, ValueError, RuntimeError) as error:
        # imported here: it loads transformers, which options of the command line need not
        from cats.checkpoint import first_line

        raise StorageError(
            f"{source.name} is no file here, and no data set that can be read: {first_line(error)}"
        ) from error
