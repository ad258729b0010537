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
                words = ", ".join(f"{n} {v}" for n, v in rest.items() if v not in (None, "none"))
                name = f"{r.benchmark} on {r.environment['device']}: {words}"
                key = (r.settings["variant"], r.settings["sparsity"])
                groups.setdefault(name, {})[key] = r
        return {name: list(group.values()) for name, group in groups.items()}


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
