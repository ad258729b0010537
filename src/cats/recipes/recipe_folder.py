"""The folder of the paper's recipe: it holds the results of one recipe, each measured once."""

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
        progress: Shows what cannot be measured here.
    """

    path: Path
    progress: Progress

    def check(self, settings: Mapping[str, Value]) -> None:
        """Write the settings of the folder's results, or compare them with those in the folder.

        Raises:
            DataError: If the folder holds results of other settings, or of a release that did not
                write the settings.
        """
        path = self.path / _RECIPE
        if not path.exists():
            if has_results(self.path):
                raise DataError(
                    f"{self.path}: holds results, but no {_RECIPE} that says what they are of: "
                    "an older release wrote them; name another folder or delete it"
                )
            save_json(path, "recipe", {"settings": dict(settings)})
        # read again: another process may fill the same folder
        check_same(path, "results", load_json(path, "recipe").get("settings", {}), settings)

    def read(self, file: str) -> list[Result]:
        """The results of a file; none where there is no such file."""
        path = self.path / file
        return read_results(path) if path.exists() else []

    def keep(
        self,
        file: str,
        measure: Callable[[], Iterable[Result]],
        settings: Mapping[str, Value] | None = None,
        sparsities: Sequence[float] = (),
    ) -> None:
        """Measure and write a file of results, unless it holds results of all sparsities.

        Args:
            file: Its name within the folder.
            measure: Gives the results.
            settings: Settings that results in the file must have.
            sparsities: Sparsities that the file must hold.

        Raises:
            DataError: If the file holds results of other settings.
        """
        path, results = self.path / file, self.read(file)
        for result in results:
            check_same(path, "results", result.settings, settings or {})
        if not results or set(sparsities) - {r.settings.get("sparsity") for r in results}:
            try:
                write_results(path, list(measure()))
            except BackendError as error:
                self.progress.say(f"left out: {file}: {error}")

    def targets_in(self, file: str, targets: Iterable[float]) -> list[float]:
        """These targets and those of a file's results, since all are timed in turns."""
        before = {float(r.settings.get("sparsity") or 0) for r in self.read(file)} - {0.0}
        return sorted({*targets, *before})

    def add_variants(self, file: str, scores: Sequence[Result], shared: Iterable[str]) -> None:
        """Write scores of tasks, beside those of other variants from an earlier run."""
        before = of_other_variants(self.read(file), scores, {*shared})
        write_results(self.path / file, [*scores, *before])


def of_other_variants(
    before: Sequence[Result], now: Sequence[Result], shared: set[str]
) -> list[Result]:
    """Scores of an earlier run whose variants are not in this run.

    Only variants count that answered the same tasks, with the same settings ``shared``.
    """

    def question(result: Result) -> tuple[object, ...]:
        names = sorted(shared)
        return (result.settings["task"], *(result.settings.get(name) for name in names))

    questions = {question(result) for result in now}
    before = [result for result in before if question(result) in questions]
    variants, tasks = ({r.settings[key] for r in now} for key in ("variant", "task"))
    tasks_of: defaultdict[object, set[object]] = defaultdict(set)
    for result in before:
        tasks_of[result.settings["variant"]].add(result.settings["task"])
    others = {name for name in tasks_of.keys() - variants if tasks_of[name] == tasks}
    return [result for result in before if result.settings["variant"] in others]
