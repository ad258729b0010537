"""Table and plot of ``cats bench mlp``, made from its results alone."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from rich.table import Table

from cats.benchmarks.mlp import DENSE, NAME, PAPER
from cats.benchmarks.pictures import pictures
from cats.errors import DataError
from cats.results import Result, run_of

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
        self.times: dict[tuple[str, float], Result] = {}
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
        return list(dict.fromkeys(name for name, _ in self.times if name not in DENSE))

    @property
    def dense(self) -> dict[str, Result]:
        """The dense baselines and the fastest of our own kernels at threshold 0."""
        found = {name: self.times[name, 0.0] for name in DENSE if (name, 0.0) in self.times}
        own = [name for name in self.sparse_variants if name != PAPER and (name, 0.0) in self.times]
        if own:
            best = min(own, key=lambda name: self.times[name, 0.0].value)
            found[f"{best} at 0"] = self.times[best, 0.0]
        return found

    @property
    def best_dense(self) -> float | None:
        """In microseconds; None where the run timed no dense one."""
        return min((result.value for result in self.dense.values()), default=None)


def panels(results: Iterable[Result]) -> list[Panel]:
    """Results of this benchmark grouped by what a reader compares: each panel is of one run.

    A run all of whose points a later one measured again is left out.

    Raises:
        DataError: If there are none.
    """
    groups: dict[_Key, dict[str, Panel]] = {}
    for result in results:
        if result.benchmark != NAME or result.quantity != "time":
            continue
        s = result.settings
        key: _Key = (
            str(result.environment["device"]), int(s["hidden_size"] or 0),
            int(s["intermediate_size"] or 0), str(s["dtype"]), int(s["batch"] or 0),
            str(s["neighbour"]),
        )  # fmt: skip
        panel = groups.setdefault(key, {}).setdefault(run_of(result), Panel(key))
        panel.times[str(s["variant"]), float(s["sparsity"] or 0)] = result
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
    view = Table(title=panel.title)
    columns = ("drop", "variant", "us", "quartiles", "limit us", "of limit", "x dense")
    for column in columns:
        data = column in ("variant", "us", "quartiles")
        view.add_column(column, justify="left" if column == "variant" else "right", no_wrap=data)
    best = panel.best_dense
    for (name, sparsity), result in sorted(panel.times.items(), key=lambda item: item[0][1]):
        limit = float(result.settings["limit_us"] or 0)
        view.add_row(
            "dense" if name in DENSE else f"{sparsity:.0%}", name, f"{result.value:.1f}",
            f"{result.low:.1f}-{result.high:.1f}", f"{limit:.1f}", f"{limit / result.value:.2f}",
            "" if best is None else f"{best / result.value:.2f}",
        )  # fmt: skip
    if best is None:
        view.caption = "no dense MLP was timed in this run"
        return view
    all_four = ", ".join(f"{name} {result.value:.1f}" for name, result in panel.dense.items())
    view.caption = f"best dense {best:.1f} us of: {all_four}"
    return view


def plot(panels: list[Panel], path: Path) -> None:
    """Time against sparsity, one picture a panel, with the memory limit as a dashed line.

    Raises:
        DataError: If matplotlib is not installed.
    """
    figure, axes = pictures(len(panels))
    for panel, axis in zip(panels, axes, strict=True):
        limits: dict[float, float] = {}
        lines: defaultdict[str, list[Result]] = defaultdict(list)
        for (name, sparsity), result in sorted(panel.times.items(), key=lambda item: item[0][1]):
            limits[sparsity] = float(result.settings["limit_us"] or 0)
            if name in DENSE:
                axis.axhline(result.value, color="0.6", linewidth=1, linestyle=":")
                axis.text(
                    1, result.value, f"{name} ", color="0.4", fontsize=7, va="bottom", ha="right",
                    transform=axis.get_yaxis_transform(),
                )  # fmt: skip
            else:
                lines[name].append(result)
        for name, measured in lines.items():
            axis.errorbar(
                [float(r.settings["sparsity"] or 0) for r in measured],
                [r.value for r in measured],
                [[r.value - r.low for r in measured], [r.high - r.value for r in measured]],
                label=name, marker="o", capsize=2,
            )  # fmt: skip
        axis.plot(list(limits), list(limits.values()), "k--", linewidth=1, label="memory limit")
        axis.set(title=panel.title, xlabel="sparsity", ylabel="us a call")
        axis.title.set_fontsize(8)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    figure.savefig(path)
