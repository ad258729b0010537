"""Numbers in sentences that come from results files.

``<!-- = PATH: EXPRESSION: FORMAT -->24.9<!-- / -->`` is such a number. An expression is arithmetic
over fields of records: ``value(variant="dense", task="mean")`` is the value of the only measurement
of which all that stands in the brackets is true. PATH is a file or a folder. FORMAT is that of
Python, such as ``.1f``; with ``+`` or ``%`` it says sign or percent. The mark does not begin a
line, where Markdown would end the paragraph.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cats.errors import DataError
from cats.history import History, is_history, recovered
from cats.results import Result, TokenTime, read_results

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


class Facts:
    """All that the results and histories in a file or folder say.

    Of a history, each evaluated text of each evaluation is a row with ``run``, ``text``, ``step``,
    ``point`` (``"first"``, ``"last"`` or ``"between"``), ``loss``, ``sparsity`` and ``recovered``,
    and each task a row with ``run``, ``task``, ``point`` and ``accuracy``.
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
        self._rows: list[tuple[str, Mapping[str, Any]]] = []
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

    def get(self, field: str, wanted: Mapping[str, Any]) -> float:
        """A field of the only measurement with some fields of the wanted values.

        Where it was measured again, the last one counts.

        Raises:
            DataError: If no measurement fits, or more than one.
        """
        fitting = {
            identity: row
            for identity, row in self._rows
            if all(row.get(name, _ABSENT) == value for name, value in wanted.items())
            and isinstance(row.get(field), int | float)
        }
        asked = f"{field}({', '.join(f'{name}={value!r}' for name, value in wanted.items())})"
        if not fitting:
            raise DataError(f"nothing in {self._path} is {asked}")
        if len(fitting) > 1:
            first, second = list(fitting.values())[:2]
            names = [n for n in first if n not in _VALUES and first[n] != second.get(n, _ABSENT)]
            raise DataError(
                f"{len(fitting)} measurements in {self._path} are {asked}; say also one of "
                f"{', '.join(names)}"
            )
        return float(next(iter(fitting.values()))[field])


_ABSENT = object()
# Of a row, what does not say which measurement it is.
_VALUES = {"value", "low", "high", "samples"}


def number(facts: Facts, expression: str, form: str) -> str:
    """The number that an expression makes of what a results file or folder says.

    Raises:
        DataError: If it is no such expression, or a measurement is not there or not the only one.
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
            wanted = {word.arg: ast.literal_eval(word.value) for word in keywords if word.arg}
            return facts.get(field, wanted)
    raise DataError(
        f"{ast.unparse(node)!r} is no number: write FIELD(NAME=VALUE, ...), and + - * / between"
    )


def _row_of(result: Result) -> tuple[str, Mapping[str, Any]]:
    row = {**result.model_dump(exclude={"environment"}), "device": result.device}
    if isinstance(result, TokenTime):
        row |= {"tokens_per_second": result.tokens_per_second, "speedup": result.speedup}
    key = [result.benchmark, result.quantity, result.device, result.measured]
    return json.dumps(key, sort_keys=True), row


def _rows_of(
    run: str, history: History, all_of: Mapping[str, History]
) -> list[tuple[str, Mapping[str, Any]]]:
    rows: list[tuple[str, Mapping[str, Any]]] = []
    for index, point in enumerate(history.points):
        last = index == len(history.points) - 1
        where = "first" if index == 0 else "last" if last else "between"
        about = {"run": run, "point": where, "step": point.step, "tokens": point.tokens}
        for text, loss in point.losses.items():
            share = recovered(history, all_of.values(), text) if last else None
            more = {"loss": loss, "sparsity": point.sparsity, "recovered": share}
            rows.append((f"{run} {text} {index}", {**about, "text": text, **more}))
        for task, accuracy in point.accuracy.items():
            rows.append((f"{run} {task} {index}", {**about, "task": task, "accuracy": accuracy}))
    return rows
