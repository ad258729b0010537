"""How a model answered each question of a task: scores, standard errors, paired differences."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cats.errors import DataError, FormatError, StorageError
from cats.storage import replacing

_VERSION = 1
Value = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Score:
    """A mean over questions, and its standard error (None for a single question)."""

    value: float
    stderr: float | None
    questions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question and its answer.

    Attributes:
        key: Task, number of the question and, where the task has several, the answer's filter.
        prompt_hash: SHA-256 of the prompt: two answers to one question must have the same.
        answer: The log-likelihood of each choice, or the generated text, as JSON holds it.
        scores: Name of each metric, such as ``"acc"``, to this question's share of it.
    """

    key: str
    prompt_hash: str
    answer: object
    scores: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """The answers of one model to one task.

    Attributes:
        task: Name of the task or group of tasks.
        split: The split of the data that the questions come from, such as ``"test"``.
        settings: All that the answers depend on, such as hashes of weights and data.
        environment: Device and versions of the run; see :func:`cats.results.environment`.
        questions: In the order of the task.
    """

    task: str
    split: str
    settings: dict[str, Value]
    environment: dict[str, Value]
    questions: list[Question]

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(name for q in self.questions for name in q.scores))

    def score(self, metric: str) -> Score:
        """Mean of a metric over the questions; for a group of tasks, over those of all tasks."""
        return _mean([q.scores[metric] for q in self.questions if metric in q.scores])

    def save(self, path: Path) -> None:
        """Write JSON lines: a header, then one line per question; the file is whole or absent."""
        header = {
            "version": _VERSION,
            "task": self.task,
            "split": self.split,
            "settings": self.settings,
            "environment": self.environment,
        }
        lines = [header, *(asdict(question) for question in self.questions)]
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")

    @classmethod
    def load(cls, path: Path) -> Answers:
        """Read what :meth:`save` wrote.

        Raises:
            StorageError: If the file cannot be read.
            FormatError: If it holds something else, or comes from a newer release.
        """
        try:
            lines = path.read_text("utf-8").splitlines()
        except OSError as error:
            raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
        try:
            header, *questions = map(json.loads, lines)
            version = header.pop("version")
            if version != _VERSION:
                raise FormatError(
                    f"{path}: answers of format {version}, this release reads {_VERSION}"
                )
            return cls(**header, questions=[Question(**question) for question in questions])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"{path}: not a file of answers ({error})") from error


def paired_difference(first: Answers, second: Answers, metric: str) -> Score:
    """Mean of ``second - first`` question by question, and its standard error.

    Raises:
        DataError: If the two did not answer the same questions.
    """
    first_prompts, second_prompts = (
        [(q.key, q.prompt_hash) for q in answers.questions] for answers in (first, second)
    )
    if first_prompts != second_prompts:
        raise DataError(
            f"{first.task}: the two models were asked different questions ({len(first_prompts)} "
            f"and {len(second_prompts)}); use the same data and --limit for both"
        )
    pairs = zip(first.questions, second.questions, strict=True)
    return _mean([b.scores[metric] - a.scores[metric] for a, b in pairs if metric in a.scores])


def _mean(values: Sequence[float]) -> Score:
    if not values:
        raise DataError("no question has this metric")
    stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Score(statistics.fmean(values), stderr, len(values))
