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
class Measured:
    """One variant of a model: its quality and its speed.

    Attributes:
        quality: Its perplexity.
        times: Name of each decode loop to the time of a token.
    """

    quality: Perplexity
    times: dict[str, DemoTime]

    def speed(self, loop: str, value: float | None = None) -> float:
        """Tokens per second through a loop, or from another time in milliseconds."""
        return 1e3 / (self.times[loop].value if value is None else value)


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """Quality and speed of one model, dense and sparse.

    Attributes:
        dense: The dense model.
        sparse: Its sparse variants.
    """

    dense: Measured
    sparse: list[Measured]

    @property
    def loop(self) -> str:
        """The first loop, in which all are compared."""
        return next(iter(self.dense.times))

    def sentence(self) -> str:
        """What was gained for what: by the best method, and beside it by CATS."""
        best = self._best()
        text = f"{_name(best)} {self._gain(best)}"
        others = [m for m in self.sparse if m.quality.method != best.quality.method]
        if others:
            at_speed = best.speed(self.loop)
            near = min(others, key=lambda m: abs(m.speed(self.loop) - at_speed))
            text += f"; {_name(near)} {self._gain(near, short=True)}"
        return f"{text}."

    def _best(self) -> Measured:
        """The fastest whose perplexity rises by a tenth at most, else the one of best quality."""
        limit = 1.1 * self.dense.quality.value
        good = [m for m in self.sparse if m.quality.value <= limit]
        if good:
            return max(good, key=lambda m: m.speed(self.loop))
        return min(self.sparse, key=lambda m: m.quality.value)

    def _gain(self, measured: Measured, *, short: bool = False) -> str:
        dense, sparse = (m.speed(self.loop) for m in (self.dense, measured))
        rise = measured.quality.value / self.dense.quality.value - 1
        if short:
            return f"decodes {sparse / dense:.2f} times as fast, for {rise:+.1%}"
        return (
            f"decodes {sparse / dense:.2f} times as fast as the dense model ({sparse:.1f} instead "
            f"of {dense:.1f} tokens per second), for {rise:+.1%} of perplexity on held-out text "
            f"({measured.quality.value:.2f} instead of {self.dense.quality.value:.2f})"
        )


def _name(measured: Measured) -> str:
    return measured.quality.variant.replace("cats", "CATS")


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
        groups: dict[str, dict[tuple[str, str, float], Time]] = {}
        for r in self.results:
            if isinstance(r, Time):
                hidden = ("variant", "model_variant", "sparsity")
                words = ", ".join(
                    f"{name.replace('_', ' ')} {value:,}"
                    if type(value) is int
                    else f"{name.replace('_', ' ')} {value}"
                    for name, value in r.measured.items()
                    if name not in hidden and value not in (None, "none")
                )
                group = groups.setdefault(f"{r.benchmark} on {r.device}: {words}", {})
                ran = r.ran if isinstance(r, DemoTime) else ""
                group[r.variant, ran, r.sparsity] = r
        return {name: list(group.values()) for name, group in groups.items()}

    def tradeoffs(self) -> list[Tradeoff]:
        """Perplexity and speed of the same model, dense and sparse, where both were measured."""
        times: dict[tuple[str, str, str], dict[str, DemoTime]] = {}
        for r in self.results:
            if isinstance(r, DemoTime):
                times.setdefault((r.model, r.dtype, r.ran), {})[r.variant] = r
        tradeoffs = []
        for group in self.perplexities().values():
            measured = [
                Measured(p, loops)
                for p in group
                if p.quantised is None and (loops := times.get((p.model, p.dtype, p.variant)))
            ]
            dense = next((m for m in measured if m.quality.method == "dense"), None)
            if dense is None:
                continue
            loop = next(iter(dense.times))
            sparse = [m for m in measured if m is not dense and loop in m.times]
            if sparse:
                tradeoffs.append(Tradeoff(dense, sparse))
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
