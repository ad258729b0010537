"""Read results and profiles, and group them as a reader compares them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from cats.errors import DataError, FormatError, StorageError
from cats.history import is_history
from cats.results import (
    DemoTime,
    MLPTime,
    Perplexity,
    ProfileRecord,
    Result,
    TaskScore,
    TokenTime,
    read_results,
)

# Records with a time, a variant and a sparsity.
Time = MLPTime | TokenTime | DemoTime
_Q = TypeVar("_Q", Perplexity, TaskScore)
# A name for readers, and the hashes of the model and text.
_GroupKey = tuple[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """What one sparse variant costs in perplexity and gives in speed, measured on one model.

    Attributes:
        dense: Perplexity of the dense model.
        sparse: Perplexity of the sparse one.
        times: Name of each decode loop to the time of a token, dense and sparse.
    """

    dense: Perplexity
    sparse: Perplexity
    times: dict[str, tuple[DemoTime, DemoTime]]

    @property
    def labels(self) -> tuple[str, str]:
        """Labels of the dense and the sparse model."""
        return self.dense.variant, self.sparse.variant

    @staticmethod
    def speed(time: DemoTime, value: float | None = None) -> float:
        """Tokens per second, from the value of a time or from another one in milliseconds."""
        return 1e3 / (time.value if value is None else value)

    def sentence(self) -> str:
        """What was gained for what, in the first loop."""
        dense, sparse = (self.speed(time) for time in next(iter(self.times.values())))
        name = self.labels[1].replace("cats", "CATS")
        ratio = f"{sparse / dense:.2f} times as fast as the dense model"
        return (
            f"{name} decodes {ratio} ({sparse:.1f} instead of {dense:.1f} tokens per second), and "
            f"its perplexity on held-out text is {self.sparse.value:.2f} instead of "
            f"{self.dense.value:.2f}."
        )


@dataclass(slots=True)
class Material:
    """What a report is made of.

    Attributes:
        results: Results of every kind, in the order of their files.
        profiles: What ``cats profile -o`` wrote.
        files: Names of the files.
    """

    results: list[Result] = field(default_factory=list)
    profiles: list[ProfileRecord] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, paths: Iterable[Path]) -> Material:
        """Read results (``.jsonl``), profiles (``.json``), and folders that hold some.

        Raises:
            StorageError: If a file cannot be read.
            FormatError: If a file holds something else.
            DataError: If there is nothing in them.
        """
        material = cls()
        histories = 0
        for path in paths:
            for file in _files(path):
                if file.suffix == ".jsonl" and path.is_dir() and is_history(file):
                    histories += 1
                    continue
                material.files.append(str(file.relative_to(path.parent)))
                if file.suffix == ".jsonl":
                    material.results += read_results(file)
                else:
                    material.profiles.append(ProfileRecord.load(file))
        if not material.results and not material.profiles:
            hint = "; cats bench results curves draws histories of fine-tuning" if histories else ""
            raise DataError(
                f"no results: name .jsonl files of results or folders that hold some{hint}"
            )
        return material

    def tasks(self) -> dict[str, list[TaskScore]]:
        """Model and limit to its results of zero-shot tasks; a repeated one counts once."""
        groups: dict[_GroupKey, dict[Hashable, TaskScore]] = {}
        for r in self.results:
            if isinstance(r, TaskScore):
                limit = "" if r.limit is None else f", at most {r.limit:,} questions per task"
                group = f"{r.model}, {r.dtype}{limit}", r.hashes
                groups.setdefault(group, {})[r.variant, r.task, r.quantity] = r
        return _named(groups)

    def perplexities(self) -> dict[str, list[Perplexity]]:
        """Model and text to its perplexities, one per variant."""
        groups: dict[_GroupKey, dict[Hashable, Perplexity]] = {}
        for r in self.results:
            if isinstance(r, Perplexity):
                group = f"{r.model}, {r.dtype}, {r.tokens:,} tokens of {r.text}", r.hashes
                groups.setdefault(group, {})[r.variant] = r
        return _named(groups)

    def times(self) -> dict[str, list[Time]]:
        """What was timed, with its device and settings, to the times of all its variants."""
        groups: dict[str, dict[tuple[str, float], Time]] = {}
        for r in self.results:
            if isinstance(r, Time):
                words = ", ".join(
                    f"{name.replace('_', ' ')} {value:,}"
                    if type(value) is int
                    else f"{name.replace('_', ' ')} {value}"
                    for name, value in r.measured.items()
                    if name not in ("variant", "sparsity") and value not in (None, "none")
                )
                group = groups.setdefault(f"{r.benchmark} on {r.device}: {words}", {})
                group[r.variant, r.sparsity] = r
        return {name: list(group.values()) for name, group in groups.items()}

    def tradeoffs(self) -> list[Tradeoff]:
        """Perplexity and speed of the same model, dense and sparse, where both were measured."""
        times: dict[tuple[str, str, str], dict[float, DemoTime]] = {}
        for r in self.results:
            if isinstance(r, DemoTime):
                times.setdefault((r.model, r.dtype, r.variant), {})[r.sparsity] = r
        tradeoffs = []
        for group in self.perplexities().values():
            dense = next((r for r in group if r.method == "dense"), None)
            for p in group:
                target = p.target_sparsity or 0.0
                pairs = {
                    loop: (by_sparsity[0.0], by_sparsity[target])
                    for (model, dtype, loop), by_sparsity in times.items()
                    if (model, dtype, p.method) == (p.model, p.dtype, "cats")
                    and {0.0, target} <= by_sparsity.keys()
                }
                if dense is not None and target and pairs and p.quantised is None:
                    tradeoffs.append(Tradeoff(dense, p, pairs))
        return tradeoffs


def _named(groups: dict[_GroupKey, dict[Hashable, _Q]]) -> dict[str, list[_Q]]:
    """Name of each group to its sorted results. Groups of one name have their hashes added."""
    names = Counter(name for name, _ in groups)
    named = {}
    for (name, hashes), group in groups.items():
        label = name if names[name] == 1 else f"{name}, hashes {' '.join(hashes) or 'unknown'}"
        named[label] = sorted(group.values(), key=lambda r: r.order)
    return named


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        # answers to questions are not results
        lines = path.rglob("*.jsonl")
        results = [p for p in lines if "answers" not in p.relative_to(path).parts]
        return sorted([*results, *path.rglob("profile*.json")])
    if not path.is_file():
        raise StorageError(f"{path}: no such file")
    if path.suffix not in (".jsonl", ".json"):
        raise FormatError(f"{path}: expected results (.jsonl) or a profile (.json)")
    return [path]
