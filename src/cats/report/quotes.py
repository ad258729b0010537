"""Tables and numbers in documents that come from results files: none is typed by hand.

A document holds ``<!-- mlp: PATH -->`` and ``<!-- /mlp -->``, each on a line of its own; the table
of that file stands between them. ``decode`` instead of ``mlp`` quotes times of tokens, ``peer``
those beside llama.cpp, ``finetune`` the histories in a folder, ``quality`` the folder of ``cats
reproduce``. A number in a sentence stands between two marks of its own, as
:mod:`cats.report.numbers` says.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from cats.errors import DataError
from cats.history import History
from cats.report import finetuning, mlp, peers, quality, tokens
from cats.report.numbers import NUMBER, Facts, number
from cats.results import read_results


def _quality(path: Path) -> str:
    return "\n".join(table.markdown() for table in quality.tables(quality.read_quality(path)))


def _finetune(path: Path) -> str:
    runs = {file.stem: History.load(file) for file in sorted(path.glob("*.jsonl"))}
    return finetuning.table(runs).markdown()


# Kind of a quote to what makes its table from a path.
_TABLES: dict[str, Callable[[Path], str]] = {
    "mlp": lambda path: mlp.summary(mlp.panels(read_results(path))).markdown(),
    "decode": lambda path: tokens.summary(tokens.panels(read_results(path))).markdown(),
    "peer": lambda path: peers.summary(read_results(path)).markdown(),
    "finetune": _finetune,
    "quality": _quality,
}
_QUOTE = re.compile(
    rf"(?<=^<!-- )({'|'.join(_TABLES)})(: )(\S+)( -->\n)(.*?)(?=^<!-- /\1 -->$)", re.S | re.M
)
# The beginning of a quote, complete or not.
_BEGINNING = re.compile(rf"<!-- (?:=|{'|'.join(f'{kind}:' for kind in _TABLES)})")


def requote(document: Path) -> str:
    """The text of a document with each quoted table and number made anew.

    Paths start at the folder of the document.

    Raises:
        StorageError: If a file cannot be read.
        DataError: If the document quotes nothing, if a mark has no end, or if the files do not
            hold a number.
    """

    def table(match: re.Match[str]) -> str:
        return "".join(match.group(1, 2, 3, 4)) + _TABLES[match[1]](document.parent / match[3])

    def quoted(match: re.Match[str]) -> str:
        begin, path, expression, form, _, end = match.groups()
        try:
            if text[: match.start()].endswith(("\n", "\n ")) or match.start() == 0:
                raise DataError("a number begins its line, where Markdown ends a paragraph")
            return begin + number(facts_of(document.parent / path), expression, form) + end
        except DataError as error:
            line = text.count("\n", 0, match.start()) + 1
            raise DataError(f"{document}, line {line}: {error}") from error

    facts_of = cache(Facts)
    text = document.read_text(encoding="utf-8")
    marks = len(_BEGINNING.findall(text))
    changed, numbers = NUMBER.subn(quoted, text)
    changed, tables = _QUOTE.subn(table, changed)
    if not marks:
        raise DataError(
            f"{document}: has no line <!-- KIND: PATH -->, where KIND is one of "
            f"{', '.join(_TABLES)}, and no number <!-- = PATH: EXPRESSION: FORMAT -->0<!-- / -->"
        )
    if tables + numbers != marks:
        raise DataError(
            f"{document}: {marks} marks begin a table or a number and {tables + numbers} are "
            "complete: a table ends with a line <!-- /KIND -->, a number with <!-- / -->"
        )
    return changed
