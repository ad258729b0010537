"""Tables and plot of ``cats bench mlp``, from its results alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from cats.errors import DataError
from cats.report import plots
from cats.report.material import Time
from cats.report.tables import Table, cell
from cats.results import DENSE_MLPS, PAPER_MLP, TORCH_INT4, MLPTime, Result, in_codes, run_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# device, hidden size, intermediate size, dtype, batch, neighbour, how weights are quantised
_Key = tuple[str, int, int, str, int, str, str]
# What reads all rows, whatever the thresholds.
_DENSE = (*DENSE_MLPS, TORCH_INT4)


class Panel:
    """The results of one shape, storage, batch and neighbour on one device, of one run.

    Attributes:
        times: Variant and sparsity to its time.
        run_label: Words that tell the run from others with the same title; empty without others.
    """

    def __init__(self, key: _Key) -> None:
        self.device, self.hidden_size, self.intermediate_size = key[:3]
        self.dtype, self.batch, self.neighbour, self.codes = key[3:]
        self.times: dict[tuple[str, float], MLPTime] = {}
        self.run_label = ""

    @property
    def title(self) -> str:
        neighbour = "" if self.neighbour == "none" else f", between {self.neighbour}"
        shape = f"{self.hidden_size}x{self.intermediate_size}"
        return (
            f"{self.device}, {shape}, {self.dtype}{self.codes}, batch {self.batch}{neighbour}"
            f"{self.run_label}"
        )

    @property
    def sparse_variants(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.times if name not in _DENSE))

    @property
    def dense(self) -> dict[str, MLPTime]:
        """The dense baselines and the fastest of our own kernels at threshold 0."""
        at_zero = {name: time for (name, sparsity), time in self.times.items() if sparsity == 0}
        dense = {name: at_zero[name] for name in _DENSE if name in at_zero}
        own = [name for name in at_zero if name not in (*_DENSE, PAPER_MLP)]
        if own:
            fastest = min(own, key=lambda name: at_zero[name].value)
            dense[f"{fastest} at 0"] = at_zero[fastest]
        return dense

    @property
    def best_dense(self) -> float | None:
        """In microseconds; None if the run timed no dense MLP."""
        return min((result.value for result in self.dense.values()), default=None)

    def over_dense(self, time: MLPTime) -> float | None:
        """Speed over the best dense MLP of the same run."""
        return None if self.best_dense is None else self.best_dense / time.value


def panels(results: Iterable[Result]) -> list[Panel]:
    """Results of this benchmark grouped by what a reader compares: each panel is of one run.

    A run is left out if a later one measured all of its points again.

    Raises:
        DataError: If there are none.
    """
    groups: dict[_Key, dict[str, Panel]] = {}
    for r in results:
        if isinstance(r, MLPTime):
            shape = r.hidden_size, r.intermediate_size
            codes = in_codes(r.bits, r.group_size)
            key = r.device, *shape, r.dtype, r.batch, r.neighbour, codes
            panel = groups.setdefault(key, {}).setdefault(run_of(r), Panel(key))
            panel.times[r.variant, r.sparsity] = r
    if not groups:
        raise DataError("no result of `cats bench mlp` in the file")
    return [panel for runs in groups.values() for panel in _current([*runs.values()])]


def _current(runs: list[Panel]) -> list[Panel]:
    """The runs that no later one measured again. If they are several, each gets a label."""
    current = [
        panel
        for number, panel in enumerate(runs)
        if not any(panel.times.keys() <= later.times.keys() for later in runs[number + 1 :])
    ]
    for panel in current if len(current) > 1 else []:
        time = next(iter(panel.times.values())).environment.get("time")
        panel.run_label = f", run of {time}"
    return current


def table(panel: Panel) -> Table:
    """Times in microseconds, fractions of the run's memory limit, and speed over the best dense."""
    rows = []
    for (name, sparsity), time in sorted(panel.times.items(), key=lambda item: item[0][1]):
        target = "dense" if name in _DENSE else f"{sparsity:.0%}"
        quartiles = f"{time.low:.1f}-{time.high:.1f}"
        limit = [f"{time.limit_us:.1f}", f"{time.limit_us / time.value:.2f}"]
        speedup = cell(panel.over_dense(time), ".2f")
        rows.append([name, target, f"{time.value:.1f}", quartiles, *limit, speedup])
    dense = ", ".join(f"{name} {time.value:.1f}" for name, time in panel.dense.items())
    return Table(
        title=panel.title,
        columns=("variant", "drop", "us", "quartiles, us", "limit, us", "of limit", "x dense"),
        rows=rows,
        caption="no dense MLP was timed in this run"
        if panel.best_dense is None
        else f"best dense {panel.best_dense:.1f} us of: {dense}",
    )


def summary(shapes: Sequence[Panel]) -> Table:
    """Calls chained back to back: one row per shape and variant, one column per sparsity."""
    chained = [panel for panel in shapes if panel.neighbour == "none"]
    if not chained:
        raise DataError("no result of calls chained back to back in the file")
    sparsities = sorted({sparsity for panel in chained for _, sparsity in panel.times})
    rows = []
    for panel in chained:
        tokens = f", {panel.batch} tokens" if panel.batch > 1 else ""
        shape = f"{panel.hidden_size}x{panel.intermediate_size}"
        shape += f"{panel.codes}{tokens}{panel.run_label}"
        dense = ", ".join(f"{name} {time.value:.1f}" for name, time in panel.dense.items())
        about = f"best dense of: {dense}" if dense else "no dense in this run"
        first = cell(panel.best_dense, ".1f")
        rows.append([shape, about, first, *[""] * (len(sparsities) - 1)])
        for name in panel.sparse_variants:
            times = [panel.times.get((name, sparsity)) for sparsity in sparsities]
            rows.append(["", name, *(_time_cell(panel, time) for time in times)])
    return Table(
        title=f"{chained[0].device}, {chained[0].dtype}: microseconds per call "
        "(fraction of the memory limit, speed-up over the best dense of the same run)",
        columns=["shape", "", *(f"{sparsity:.0%}" for sparsity in sparsities)],
        rows=rows,
        names=2,
    )


def _time_cell(panel: Panel, time: MLPTime | None) -> str:
    if time is None:
        return ""
    ratio = panel.over_dense(time)
    speedup = "" if ratio is None else f", {ratio:.2f}x"
    return f"{time.value:.1f} ({time.limit_us / time.value:.2f}{speedup})"


def plot(shapes: Sequence[Panel]) -> Figure:
    """Time over sparsity, one picture for each panel.

    Raises:
        DataError: If matplotlib is not installed.
    """
    figure, axes = plots.panels(len(shapes))
    for panel, axis in zip(shapes, axes, strict=True):
        draw(axis, list(panel.times.values()), title=panel.title)
    return figure


def draw(axis: Axes, times: Sequence[Time], *, title: str = "") -> None:
    """Time over sparsity of every variant, all of one unit, with the limit that its bytes set."""
    lines: defaultdict[str, list[Time]] = defaultdict(list)
    for time in sorted(times, key=lambda time: time.sparsity):
        lines[time.variant].append(time)
    for number, (variant, line) in enumerate(lines.items()):
        colour = plots.colour(number)
        if len(line) == 1:
            axis.axhline(line[0].value, linestyle=":", color=colour, label=variant)
        else:
            points = [(time.sparsity, time.value, time.low, time.high) for time in line]
            plots.line(axis, points, label=variant, colour=colour)
    # dense MLPs in the dtype may read other bytes
    own = [t for t in times if t.variant not in _DENSE] or times
    plots.limit(axis, {t.sparsity: t.limit for t in own if t.limit is not None})
    plots.label(axis, x="sparsity", y=f"{times[0].unit} per call", title=title)
    axis.set_ylim(bottom=0)
    plots.legend(axis)
