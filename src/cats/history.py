"""The course of one fine-tuning in JSON lines: settings first, then one point per evaluation."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from cats.errors import FormatError, StorageError
from cats.storage import check_version, replacing

__all__ = ["History", "Point", "best_runs", "is_history", "names_of", "recovered"]

_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """What one evaluation measured.

    Attributes:
        step: Optimiser steps before it.
        tokens: Tokens trained on, without padding, over all processes.
        train_loss: Mean over the steps since the point before; None at the start. With distillation
            it includes the divergence from the dense model.
        learning_rate: That of the last step; None at the start.
        losses: Name of each evaluation to its log-perplexity: mean negative log-likelihood per
            token.
        accuracy: Name of each task to the share of right answers, if it was measured.
        sparsity: Mean share of neurons dropped during the evaluations; None for a dense model.
        seconds_per_step: Time of training alone, since the point before; None at the start.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = {
        "strict": True,
        "extra": "forbid",
        "allow_inf_nan": False,
    }

    step: int
    tokens: int
    train_loss: float | None = None
    learning_rate: float | None = None
    losses: dict[str, float] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)
    sparsity: float | None = None
    seconds_per_step: float | None = None


@dataclass(kw_only=True, slots=True)
class History:
    """Settings and points of one run.

    Attributes:
        settings: What was run; two runs with the same settings are the same run.
        environment: Where it ran, see :func:`cats.results.environment`.
        points: In the order of their steps.
        complete: Whether the run came to its end.
    """

    settings: dict[str, Any]
    environment: Mapping[str, object] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    complete: bool = False

    @classmethod
    def load(cls, path: Path) -> History:
        """Read a history.

        Raises:
            StorageError: If the file cannot be read.
            FormatError: If it holds something else, is of a newer release, or a field is missing,
                unknown or of another type.
        """
        # imported here: what only writes a history needs no pydantic
        from pydantic import TypeAdapter, ValidationError

        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise StorageError(f"{path}: cannot be read ({error})") from error
        blocks = [_parse(path, number, line) for number, line in enumerate(lines, start=1)]
        if not blocks or blocks[0].get("kind") != "finetuning":
            raise FormatError(f"{path}: not the history of a fine-tuning")
        check_version(blocks[0], str(path))
        for name in ("settings", "environment"):
            if not isinstance(blocks[0].get(name), dict):
                raise FormatError(f"{path}, line 1: {name}: missing, or no object")
        history = cls(settings=blocks[0]["settings"], environment=blocks[0]["environment"])
        points = TypeAdapter(Point)
        for number, block in enumerate(blocks[1:], start=2):
            if block.get("complete"):
                history.complete = True
                continue
            try:
                history.points.append(points.validate_json(lines[number - 1]))
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"]))
                raise FormatError(
                    f"{path}, line {number}: not a point of a history: {where}: "
                    f"{first['msg'].lower()}"
                ) from error
        return history

    def save(self, path: Path) -> None:
        """Write all of it; the file changes at once or not at all.

        Raises:
            StorageError: If it cannot be written.
        """
        blocks: list[dict[str, object]] = [
            {
                "version": _VERSION,
                "kind": "finetuning",
                "settings": self.settings,
                "environment": self.environment,
            }
        ]
        blocks += [dataclasses.asdict(point) for point in self.points]
        blocks += [{"complete": True}] if self.complete else []
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(block, allow_nan=False) + "\n" for block in blocks)
            file.flush()
            os.fsync(file.fileno())


def is_history(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            block = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    return isinstance(block, dict) and block.get("kind") == "finetuning"


def names_of(histories: Iterable[History]) -> tuple[list[str], list[str]]:
    """The evaluated texts of some runs, and the tasks whose answers were counted."""
    points = [point for history in histories for point in history.points]
    texts = dict.fromkeys(name for point in points for name in point.losses)
    tasks = dict.fromkeys(name for point in points for name in point.accuracy)
    return list(texts), list(tasks)


def best_runs(histories: Mapping[str, History]) -> dict[str, History]:
    """The run with the lowest last loss among those that differ in the learning rate alone.

    The first evaluated text decides.
    """
    best: dict[str, tuple[float, str, History]] = {}
    for name, history in histories.items():
        if not history.points or not history.points[-1].losses:
            continue
        key = _all_but_the_learning_rate(history)
        loss = next(iter(history.points[-1].losses.values()))
        if key not in best or loss < best[key][0]:
            best[key] = (loss, name, history)
    return {name: history for _, name, history in best.values()}


def _all_but_the_learning_rate(history: History) -> str:
    settings = {name: value for name, value in history.settings.items() if name != "run"}
    settings["options"] = {**settings["options"], "learning_rate": None}
    return json.dumps(settings, sort_keys=True)


def recovered(history: History, others: Iterable[History], text: str) -> float | None:
    """Share of the loss of a sparse model on a text that fine-tuning takes back.

    The loss is what the untuned sparse model has above the lowest log-perplexity of all dense
    points, tuned or not. None for a dense run, and if no dense run has the same weights and text.
    """
    dense = [
        point.losses[text]
        for other in others
        if other.settings["method"] == "dense"
        and _start_of(other, text) == _start_of(history, text)
        for point in other.points
        if text in point.losses
    ]
    if history.settings["method"] == "dense" or not dense or not history.points:
        return None
    first, last = history.points[0].losses.get(text), history.points[-1].losses.get(text)
    if first is None or last is None or first <= min(dense):
        return None
    return (first - last) / (first - min(dense))


def _start_of(history: History, text: str) -> list[object]:
    """What the dense model's loss on a text depends on before any training."""
    names = ("model", "revision", "weights", "tokenizer", "dtype")
    return [
        *(history.settings.get(name) for name in names),
        history.settings.get("evaluations", {}).get(text),
    ]


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        block = json.loads(line)
    except json.JSONDecodeError as error:
        raise FormatError(f"{path}, line {number}: not JSON ({error})") from error
    if not isinstance(block, dict):
        raise FormatError(f"{path}, line {number}: not an object")
    return block
