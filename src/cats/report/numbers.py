"""Numbers in sentences that come from results files.

``<!-- = PATH: EXPRESSION: FORMAT -->24.9<!-- / -->`` is such a number. An expression is arithmetic
over fields of records: ``value(variant="dense", task="mean")`` is the value of the only measurement
with these fields. PATH is a file or a folder. FORMAT is a format of Python, such as ``.1f``; a
``+`` in it shows the sign, a ``%`` makes percent. The mark does not begin a line, since Markdown
would end the paragraph there.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from cats.errors import DataError
from cats.history import History, is_history, recovered
from cats.results import PeerTokenTime, Result, TokenTime, read_results

NUMBER = re.compile(r"(<!-- = (\S+): (.+?): (\S+) -->)([^<]*)(<!-- / -->)", re.S)
_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "abs": abs,
    "max": max,
    "min": min,
    "sqrt": math.sqrt,
}


# Which measurement it is, and its fields.
_Row = tuple[str, Mapping[str, object]]


class Facts:
    """All measurements of the results and histories in a file or folder.

    Each evaluation of a history gives one row per text and one per task. The row of a text has
    ``run``, ``text``, ``step``, ``point`` (``"first"``, ``"last"`` or ``"between"``), ``loss``,
    ``sparsity`` and ``recovered``. The row of a task has ``run``, ``task``, ``step``, ``point`` and
    ``accuracy``.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            StorageError: If a file cannot be read.
            FormatError: If a file holds something else.
            DataError: If there is nothing in it.
        """
        self._path = path
        files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        self._rows: list[_Row] = []
        histories = {}
        for file in files:
            if "answers" in file.parts:
                continue
            if is_history(file):
                histories[file.stem] = History.load(file)
            else:
                self._rows += [_row_of(result) for result in read_results(file)]
        for run, history in histories.items():
            self._rows += _rows_of(run, history, histories)
        if not self._rows:
            raise DataError(f"{path}: holds no results and no history")

    def get(self, field: str, conditions: Mapping[str, object]) -> float:
        """A field of the only measurement whose other fields have the values of ``conditions``.

        If it was measured again, the last one counts.

        Raises:
            DataError: If no measurement fits, or more than one.
        """
        rows: dict[str, Mapping[str, object]] = {}
        numbers: dict[str, float] = {}
        for identity, row in self._rows:
            number = row.get(field)
            if isinstance(number, int | float) and all(
                row.get(name, _ABSENT) == value for name, value in conditions.items()
            ):
                rows[identity], numbers[identity] = row, float(number)
        terms = ", ".join(f"{name}={value!r}" for name, value in conditions.items())
        if not rows:
            raise DataError(f"nothing in {self._path} is {field}({terms})")
        if len(rows) > 1:
            first, second = list(rows.values())[:2]
            names = [n for n in first if n not in _VALUES and first[n] != second.get(n, _ABSENT)]
            raise DataError(
                f"{len(rows)} measurements in {self._path} are {field}({terms}); say also one of "
                f"{', '.join(names)}"
            )
        return next(iter(numbers.values()))


_ABSENT = object()
# Fields of a row that do not say which measurement it is.
_VALUES = {"value", "low", "high", "samples"}


def number(facts: Facts, expression: str, form: str) -> str:
    """The number that an expression gives, in a format of Python.

    Raises:
        DataError: If it is no such expression, if a measurement is not there, or if several fit.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        return format(_value(tree, facts), form)
    except (SyntaxError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{expression!r} as {form!r}: {error}") from error


def _value(node: ast.expr, facts: Facts) -> float:
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, facts)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, facts), _value(right, facts))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_value(arg, facts) for arg in args))
        case ast.Call(func=ast.Name(id=field), args=[], keywords=keywords):
            conditions = {word.arg: ast.literal_eval(word.value) for word in keywords if word.arg}
            return facts.get(field, conditions)
    raise DataError(
        f"{ast.unparse(node)!r} is no number: write FIELD(NAME=VALUE, ...), and + - * / between"
    )


def _row_of(result: Result) -> _Row:
    row = {**result.model_dump(exclude={"environment"}), "device": result.device}
    if isinstance(result, TokenTime):
        row |= {"tokens_per_second": result.tokens_per_second, "speedup": result.speedup}
    if isinstance(result, PeerTokenTime):
        row |= {
            "tokens_per_second": result.tokens_per_second,
            "over_peer": result.over_peer,
            "over_dense": result.over_dense,
        }
    key = [result.benchmark, result.quantity, result.device, result.measured]
    return json.dumps(key, sort_keys=True), row


def _rows_of(run: str, history: History, histories: Mapping[str, History]) -> list[_Row]:
    rows: list[_Row] = []
    for index, point in enumerate(history.points):
        last = index == len(history.points) - 1
        position = "first" if index == 0 else "last" if last else "between"
        common = {"run": run, "point": position, "step": point.step, "tokens": point.tokens}
        for text, loss in point.losses.items():
            share = recovered(history, histories.values(), text) if last else None
            fields = {"loss": loss, "sparsity": point.sparsity, "recovered": share}
            rows.append((f"{run} {text} {index}", {**common, "text": text, **fields}))
        for task, accuracy in point.accuracy.items():
            rows.append((f"{run} {task} {index}", {**common, "task": task, "accuracy": accuracy}))
    return rows
