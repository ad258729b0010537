"""Read results and profiles, and group them as a reader compares them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cats.errors import DataError, FormatError, StorageError
from cats.history import is_history
from cats.results import Result, place, read_results
from cats.storage import load_json

# What differs between the lines of one picture of times, or belongs to one of its points.
_OF_A_POINT = {
    "variant", "sparsity", "kept_share", "realized_sparsity", "bytes", "limit_us", "limit_ms",
    "copies", "calls", "dense_ms", "kl", "kl_of_rounding", "same_choice",
    "sparsity_error",
}  # fmt: skip

# A name for readers, and hashes of what it names.
_Group = tuple[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """What one sparse variant costs in perplexity and gives in speed, measured on one model.

    Attributes:
        dense: Perplexity of the dense model.
        sparse: Perplexity of the sparse one.
        times: Name of each decode loop to the time of a token, dense and sparse.
    """

    dense: Result
    sparse: Result
    times: dict[str, tuple[Result, Result]]

    @property
    def labels(self) -> tuple[str, str]:
        """What figures call the two."""
        return str(self.dense.settings["variant"]), str(self.sparse.settings["variant"])

    @staticmethod
    def speed(time: Result, value: float | None = None) -> float:
        """Tokens per second of a time in milliseconds: of its value, or of the one given."""
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
        results: Of every kind, in the order of their files.
        profiles: What ``cats profile -o`` wrote.
        files: Where they come from.
    """

    results: list[Result] = field(default_factory=list)
    profiles: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, paths: Iterable[Path]) -> Material:
        """Read results (``.jsonl``), profiles (``.json``), and folders that hold some.

        Raises:
            StorageError: If a file cannot be read.
            FormatError: If a file holds something else.
            DataError: If there is nothing in them.
        """
        found = cls()
        histories = 0
        for path in paths:
            for file in _files(path):
                if file.suffix == ".jsonl" and path.is_dir() and is_history(file):
                    histories += 1
                    continue
                found.files.append(str(file.relative_to(path.parent)))
                if file.suffix == ".jsonl":
                    found.results += read_results(file)
                else:
                    found.profiles.append(load_json(file, "profile"))
        if not found.results and not found.profiles:
            hint = "; cats bench curves draws histories of fine-tuning" if histories else ""
            raise DataError(
                f"no results: name .jsonl files of results or folders that hold some{hint}"
            )
        return found

    def tasks(self) -> dict[str, list[Result]]:
        """Model and limit to its results of zero-shot tasks; a repeated one counts once."""
        groups: dict[_Group, dict[Any, Result]] = {}
        for r in self.results:
            if r.benchmark == "tasks":
                s = r.settings
                asked = "" if s["limit"] is None else f", at most {s['limit']:,} questions a task"
                key = (s["variant"], s["task"], r.quantity)
                group = f"{s['model']}, {s['dtype']}{asked}", _identity(r)
                groups.setdefault(group, {})[key] = r
        return _named(groups)

    def perplexities(self) -> dict[str, list[Result]]:
        """Model and text to its perplexities, one a variant."""
        groups: dict[_Group, dict[Any, Result]] = {}
        for r in self.results:
            if r.benchmark == "perplexity":
                s = r.settings
                name = f"{s['model']}, {s['dtype']}, {s['tokens']:,} tokens of {s['text']}"
                groups.setdefault((name, _identity(r)), {})[s["variant"]] = r
        return _named(groups)

    def times(self) -> dict[str, list[Result]]:
        """What was timed, where and how to its times, over variants and sparsities."""
        groups: dict[str, dict[tuple[Any, ...], Result]] = {}
        for r in self.results:
            if r.quantity == "time" and {"variant", "sparsity"} <= r.settings.keys():
                rest = {n: v for n, v in r.settings.items() if n not in _OF_A_POINT}
                words = ", ".join(
                    f"{n.replace('_', ' ')} {v:,}"
                    if type(v) is int
                    else f"{n.replace('_', ' ')} {v}"
                    for n, v in rest.items()
                    if v not in (None, "none")
                )
                name = f"{r.benchmark} on {r.environment['device']}: {words}"
                key = (r.settings["variant"], r.settings["sparsity"])
                groups.setdefault(name, {})[key] = r
        return {name: list(group.values()) for name, group in groups.items()}

    def tradeoffs(self) -> list[Tradeoff]:
        """Perplexity and speed of the same model, dense and sparse, where both were measured."""
        times: dict[tuple[Any, ...], dict[float, Result]] = {}
        for r in self.results:
            if r.benchmark == "demo" and r.quantity == "time" and r.unit == "ms":
                s = r.settings
                key = (s["model"], s["dtype"], s["variant"])
                times.setdefault(key, {})[float(s["sparsity"] or 0)] = r
        found = []
        for group in self.perplexities().values():
            dense = next((r for r in group if r.settings["method"] == "dense"), None)
            for r in group:
                model = (r.settings["model"], r.settings["dtype"])
                target = float(r.settings["target_sparsity"] or 0)
                pairs = {
                    str(variant): (of[0.0], of[target])
                    for (*where, variant), of in times.items()
                    if tuple(where) == model
                    and r.settings["method"] == "cats"
                    and {0.0, target} <= of.keys()
                }
                if dense is not None and target and pairs:
                    found.append(Tradeoff(dense, r, pairs))
        return found


def _identity(result: Result) -> tuple[str, ...]:
    """Hashes that tell models and texts of one name apart; older results have none."""
    names = ("weights", "tokenizer", "text_hash")
    return tuple(str(result.settings[n]) for n in names if result.settings.get(n))


def _named(groups: dict[_Group, dict[Any, Result]]) -> dict[str, list[Result]]:
    """The groups, sorted, by their names; those of one name say their hashes too."""
    names = Counter(name for name, _ in groups)
    return {
        name if names[name] == 1 else f"{name}, hashes {' '.join(identity) or 'unknown'}":
            sorted(group.values(), key=place)
        for (name, identity), group in groups.items()
    }  # fmt: skip


def limit(result: Result) -> float | None:
    """The time that the bytes of a call or token take at least, in the unit of the result."""
    value = result.settings.get(f"limit_{result.unit}")
    return None if value is None else float(value)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        # the answers behind the results are none themselves
        found = path.rglob("*.jsonl")
        results = [p for p in found if "answers" not in p.relative_to(path).parts]
        return sorted([*results, *path.rglob("profile*.json")])
    if not path.is_file():
        raise StorageError(f"{path}: no such file")
    if path.suffix not in (".jsonl", ".json"):
        raise FormatError(f"{path}: expected results (.jsonl) or a profile (.json)")
    return [path]
