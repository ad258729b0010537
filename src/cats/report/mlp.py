"""Tables and plot of ``cats bench mlp``, made of its results alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from cats.errors import DataError
from cats.report import plots
from cats.report.tables import Table, cell
from cats.results import DENSE_MLPS, PAPER_MLP, MLPTime, Result, run_of

# device, hidden size, intermediate size, dtype, batch, neighbour; a panel is of one run of it
_Key = tuple[str, int, int, str, int, str]


class Panel:
    """The results of one shape, dtype, batch and neighbour on one device, of one run.

    Attributes:
        times: By variant and sparsity.
        run_words: What tells the run from others of the same in a table; empty where none is.
    """

    def __init__(self, key: _Key) -> None:
        self.device, self.hidden_size, self.intermediate_size, self.dtype, self.batch, _ = key
        self.neighbour = key[-1]
        self.times: dict[tuple[str, float], MLPTime] = {}
        self.run_words = ""

    @property
    def title(self) -> str:
        neighbour = "" if self.neighbour == "none" else f", between {self.neighbour}"
        shape = f"{self.hidden_size}x{self.intermediate_size}"
        return (
            f"{self.device}, {shape}, {self.dtype}, batch {self.batch}{neighbour}{self.run_words}"
        )

    @property
    def sparse_variants(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.times if name not in DENSE_MLPS))

    @property
    def dense(self) -> dict[str, MLPTime]:
        """The dense baselines and the fastest of our own kernels at threshold 0."""
        found = {name: self.times[name, 0.0] for name in DENSE_MLPS if (name, 0.0) in self.times}
        own = [n for n in self.sparse_variants if n != PAPER_MLP and (n, 0.0) in self.times]
        if own:
            best = min(own, key=lambda name: self.times[name, 0.0].value)
            found[f"{best} at 0"] = self.times[best, 0.0]
        return found

    @property
    def best_dense(self) -> float | None:
        """In microseconds; None where the run timed no dense one."""
        return min((result.value for result in self.dense.values()), default=None)

    def over_dense(self, time: MLPTime) -> float | None:
        """Speed over the best dense MLP of the same run."""
        return None if self.best_dense is None else self.best_dense / time.value


def panels(results: Iterable[Result]) -> list[Panel]:
    """Results of this benchmark grouped by what a reader compares: each panel is of one run.

    A run all of whose points a later one measured again is left out.

    Raises:
        DataError: If there are none.
    """
    groups: dict[_Key, dict[str, Panel]] = {}
    for r in results:
        if isinstance(r, MLPTime):
            key = r.device, r.hidden_size, r.intermediate_size, r.dtype, r.batch, r.neighbour
            panel = groups.setdefault(key, {}).setdefault(run_of(r), Panel(key))
            panel.times[r.variant, r.sparsity] = r
    if not groups:
        raise DataError("no result of `cats bench mlp` in the file")
    return [panel for runs in groups.values() for panel in _current([*runs.values()])]


def _current(runs: list[Panel]) -> list[Panel]:
    """Those runs of the same that no later one measured again, named where they are several."""
    kept = [
        panel
        for number, panel in enumerate(runs)
        if not any(panel.times.keys() <= later.times.keys() for later in runs[number + 1 :])
    ]
    for panel in kept if len(kept) > 1 else []:
        time = next(iter(panel.times.values())).environment.get("time")
        panel.run_words = f", run of {time}"
    return kept


def table(panel: Panel) -> Table:
    """Times in microseconds; fractions of the same run's memory limit; speed over best dense."""
    rows = [
        [
            name, "dense" if name in DENSE_MLPS else f"{sparsity:.0%}", f"{time.value:.1f}",
            f"{time.low:.1f}-{time.high:.1f}", f"{time.limit_us:.1f}",
            f"{time.limit_us / time.value:.2f}", cell(panel.over_dense(time), ".2f"),
        ]
        for (name, sparsity), time in sorted(panel.times.items(), key=lambda item: item[0][1])
    ]  # fmt: skip
    of = ", ".join(f"{name} {time.value:.1f}" for name, time in panel.dense.items())
    return Table(
        title=panel.title,
        columns=("variant", "drop", "us", "quartiles, us", "limit, us", "of limit", "x dense"),
        rows=rows,
        caption="no dense MLP was timed in this run"
        if panel.best_dense is None
        else f"best dense {panel.best_dense:.1f} us of: {of}",
    )


def summary(found: Sequence[Panel]) -> Table:
    """Calls chained back to back: one row for each shape and variant, one column a sparsity."""
    found = [panel for panel in found if panel.neighbour == "none"]
    if not found:
        raise DataError("no result of calls chained back to back in the file")
    sparsities = sorted({sparsity for panel in found for _, sparsity in panel.times})
    rows = []
    for panel in found:
        tokens = f", {panel.batch} tokens" if panel.batch > 1 else ""
        shape = f"{panel.hidden_size}x{panel.intermediate_size}{tokens}{panel.run_words}"
        dense = ", ".join(f"{name} {time.value:.1f}" for name, time in panel.dense.items())
        about = f"best dense of: {dense}" if dense else "no dense in this run"
        first = cell(panel.best_dense, ".1f")
        rows.append([shape, about, first, *[""] * (len(sparsities) - 1)])
        for name in panel.sparse_variants:
            times = [panel.times.get((name, sparsity)) for sparsity in sparsities]
            rows.append(["", name, *(_beside(panel, time) for time in times)])
    return Table(
        title=f"{found[0].device}, {found[0].dtype}: microseconds per call "
        "(fraction of the memory limit, speed-up over the best dense of the same run)",
        columns=["shape", "", *(f"{sparsity:.0%}" for sparsity in sparsities)],
        rows=rows,
        names=2,
    )


def _beside(panel: Panel, time: MLPTime | None) -> str:
    if time is None:
        return ""
    ratio = panel.over_dense(time)
    beside = "" if ratio is None else f", {ratio:.2f}x"
    return f"{time.value:.1f} ({time.limit_us / time.value:.2f}{beside})"


def plot(found: Sequence[Panel]) -> Any:
    """Time against sparsity, one picture for each panel.

    Raises:
        DataError: If matplotlib is not installed.
    """
    figure, axes = plots.panels(len(found))
    for panel, axis in zip(found, axes, strict=True):
        draw(axis, list(panel.times.values()), title=panel.title)
    return figure


def draw(axis: Any, times: Sequence[Any], *, title: str = "") -> None:
    """Time over sparsity of every variant, with the limit that its bytes set.

    Args:
        axis: Of matplotlib.
        times: Records with ``variant``, ``sparsity`` and ``limit``, of one unit.
        title: Of the picture.
    """
    lines: defaultdict[str, list[Any]] = defaultdict(list)
    for time in sorted(times, key=lambda time: time.sparsity):
        lines[time.variant].append(time)
    for number, (variant, of) in enumerate(lines.items()):
        colour = plots.colour(number)
        if len(of) == 1:
            axis.axhline(of[0].value, linestyle=":", color=colour, label=variant)
        else:
            points = [(time.sparsity, time.value, time.low, time.high) for time in of]
            plots.line(axis, points, label=variant, colour=colour)
    plots.limit(axis, {t.sparsity: t.limit for t in times if t.limit is not None})
    plots.label(axis, x="sparsity", y=f"{times[0].unit} per call", title=title)
    axis.set_ylim(bottom=0)
    plots.legend(axis)
