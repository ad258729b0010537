"""The folder of the paper's recipe: what is in it is not measured again, and is of one recipe."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cats.errors import BackendError, DataError
from cats.evaluation.answers import Value
from cats.evaluation.run import check_same
from cats.recipes.evaluation import write_results
from cats.recipes.progress import Progress
from cats.results import Result, read_results
from cats.storage import load_json, save_json

_RECIPE = "recipe.json"


def has_results(folder: Path) -> bool:
    """Whether a recipe has left something in a folder."""
    return any(folder.rglob("*.jsonl")) or any(folder.glob("statistics-*.safetensors"))


@dataclass(frozen=True, slots=True)
class Folder:
    """Files of results by name.

    Attributes:
        path: The folder.
        progress: Told what is left out.
    """

    path: Path
    progress: Progress

    def check(self, settings: Mapping[str, Value]) -> None:
        """Write what the folder's results depend on, or compare it with what stands there.

        Raises:
            DataError: If the folder holds results of other settings, or of a release that did not
                write down what they are of.
        """
        path = self.path / _RECIPE
        if not path.exists():
            if has_results(self.path):
                raise DataError(
                    f"{self.path}: holds results, but no {_RECIPE} that says what they are of, "
                    "as an older release wrote them; name another folder or delete it"
                )
            save_json(path, "recipe", {"settings": dict(settings)})
        # read again: another process may fill the same folder
        check_same(path, "results", load_json(path, "recipe").get("settings", {}), settings)

    def read(self, file: str) -> list[Result]:
        """The results of a file; none where it is not there."""
        path = self.path / file
        return read_results(path) if path.exists() else []

    def keep(
        self,
        file: str,
        measure: Callable[[], Iterable[Result]],
        wanted: Mapping[str, Value] | None = None,
        sparsities: Sequence[float] = (),
    ) -> None:
        """Keep the results of ``measure`` in a file, unless they are there, at all sparsities.

        Those that are there must have the settings ``wanted``.
        """
        path, found = self.path / file, self.read(file)
        for result in found:
            check_same(path, "results", result.settings, wanted or {})
        if not found or set(sparsities) - {r.settings.get("sparsity") for r in found}:
            try:
                write_results(path, list(measure()))
            except BackendError as error:
                self.progress.say(f"left out: {file}: {error}")

    def targets_in(self, file: str, targets: Iterable[float]) -> list[float]:
        """These targets and those of a file's results: all are timed in turns."""
        before = {float(r.settings.get("sparsity") or 0) for r in self.read(file)} - {0.0}
        return sorted({*targets, *before})

    def add_variants(self, file: str, found: list[Result], shared: Iterable[str]) -> None:
        """Write results of tasks, and beside them those of variants that an earlier run asked."""
        before = of_other_variants(self.read(file), found, {*shared})
        write_results(self.path / file, found + before)


def of_other_variants(before: list[Result], found: list[Result], shared: set[str]) -> list[Result]:
    """Of an earlier run with other targets or methods, what was asked the same tasks.

    The settings ``shared`` must be the same in both.
    """

    def asked_of(result: Result) -> tuple[object, ...]:
        names = sorted(shared)
        return (result.settings["task"], *(result.settings.get(name) for name in names))

    same = {asked_of(result) for result in found}
    before = [result for result in before if asked_of(result) in same]
    labels, tasks = ({r.settings[key] for r in found} for key in ("variant", "task"))
    asked: defaultdict[object, set[object]] = defaultdict(set)
    for result in before:
        asked[result.settings["variant"]].add(result.settings["task"])
    others = {label for label in asked.keys() - labels if asked[label] == tasks}
    return [result for result in before if result.settings["variant"] in others]
