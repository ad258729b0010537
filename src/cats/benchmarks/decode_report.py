"""Tables and plot of ``cats bench decode``, made from its results alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from cats.benchmarks.decode import NAME
from cats.benchmarks.pictures import pictures
from cats.errors import DataError
from cats.results import Result, run_of

if TYPE_CHECKING:
    from rich.table import Table

# What the columns mean, for below the tables.
LEGEND = """\
spread: distance of the quartiles over the median. x dense: speed over the fastest loop of the
dense model, timed in turns in the same run. limit: share of the rate at which memory could
deliver the bytes. first: time of the first token. dense: the shortest of a dense loop, timed in
turns. start: from the first call to its third token. anew: graphs compiled for it. over: peak
of memory over the dense model's weights. KL: divergence of each step from the model's modules
on the same tokens. own KL: of these modules a token at a time. same: equal choices. drop:
sparsity above that of the modules, in percentage points."""

# device, model, dtype, batch, prompt length, new tokens
_Key = tuple[str, str, str, int, int, int]
# variant, target sparsity
_Row = tuple[str, float]


class Panel:
    """The results of one model, dtype and prompt on one device; of each row the last run counts.

    Rows may be of different runs: nothing of one is compared with another.

    Attributes:
        rows: By variant and target, one result a quantity, all of one run.
        launches: By variant and target, one result a kernel.
        bandwidths: The read bandwidth of each run, GB/s.
    """

    def __init__(self, key: _Key) -> None:
        self.device, self.model, self.dtype, self.batch, self.prompt_length, _ = key
        self.rows: defaultdict[_Row, dict[str, Result]] = defaultdict(dict)
        self.launches: defaultdict[_Row, dict[str, Result]] = defaultdict(dict)
        self.bandwidths: dict[str, float] = {}

    @property
    def title(self) -> str:
        case = f"batch {self.batch}, prompt {self.prompt_length:,}"
        return f"{self.model}, {self.dtype}, {case}, on {self.device}"

    def add(self, result: Result) -> None:
        s = result.settings
        if result.quantity == "read_bandwidth":
            self.bandwidths[run_of(result)] = result.value
            return
        row = str(s["variant"]), _number(s["sparsity"])
        if result.quantity == "launch":
            self.launches[row][str(s["kernel"])] = result
        else:
            if result.quantity == "time":
                # nothing of an earlier run stands beside what is of this one
                self.launches.pop(row, None)
                self.rows[row].clear()
            self.rows[row][result.quantity] = result

    def times(self) -> dict[_Row, Result]:
        return {row: found["time"] for row, found in self.rows.items() if "time" in found}

    @property
    def runs(self) -> list[str]:
        """The runs that the rows are of."""
        return list(dict.fromkeys(map(run_of, self.times().values())))


def speedup(step: Result) -> float | None:
    """Speed over the fastest loop of the dense model that was timed in turns with it, in one run.

    None where that run timed no such loop.
    """
    dense = step.settings.get("dense_ms")
    return None if dense is None else _number(dense) / step.value


def panels(results: Iterable[Result]) -> list[Panel]:
    """Results of this benchmark grouped by what a reader compares.

    Raises:
        DataError: If there are none.
    """
    groups: dict[_Key, Panel] = {}
    for result in results:
        if result.benchmark != NAME:
            continue
        s = result.settings
        key: _Key = (
            str(result.environment["device"]), str(s["model"]), str(s["dtype"]),
            int(s["batch"] or 0), int(s["prompt_length"] or 0), int(s["new_tokens"] or 0),
        )  # fmt: skip
        groups.setdefault(key, Panel(key)).add(result)
    if not groups:
        raise DataError("no result of `cats bench decode` in the file")
    return list(groups.values())


def tables(panel: Panel) -> list[Table]:
    """Speed, then what it takes and whether it is right, then the launches of each step."""
    return [_speed(panel), _costs(panel), *(_launches(panel, row) for row in panel.launches)]


def _speed(panel: Panel) -> Table:
    """Each way to generate beside the fastest dense loop and the memory's limit."""
    rates = [f"{panel.bandwidths[run]:.0f}" for run in panel.runs if run in panel.bandwidths]
    reads = f": reads {', '.join(rates)} GB/s" if rates else ""
    several = f" ({len(panel.runs)} runs)" if len(panel.runs) > 1 else ""
    out = _table(
        panel.title + reads + several,
        "variant", "target", "dropped", "tok/s", "ms", "spread", "x dense", "GB/s", "limit",
    )  # fmt: skip
    for (variant, sparsity), step in panel.times().items():
        s = step.settings
        faster = speedup(step)
        out.add_row(
            variant,
            f"{sparsity:.0%}",
            f"{_number(s['realized_sparsity']):.1%}",
            f"{panel.batch * 1e3 / step.value:.1f}",
            f"{step.value:.2f}",
            f"{(step.high - step.low) / step.value:.0%}",
            "" if faster is None else f"{faster:.2f}",
            f"{_number(s['bytes']) / step.value / 1e6:.0f}",
            f"{_number(s['limit_ms']) / step.value:.2f}",
        )
    return out


def _costs(panel: Panel) -> Table:
    """What a token takes besides its time, and how far it is from the model's modules."""
    columns = [
        "first, ms", "dense, ms", "start, s", "anew", "peak, MB", "over",
        "KL", "own KL", "same", "drop",
    ]  # fmt: skip
    if not any("peak_memory" in found for found in panel.rows.values()):
        columns = [c for c in columns if c not in {"peak, MB", "over"}]
    out = _table("", "variant", "target", *columns)
    for (variant, sparsity), found in panel.rows.items():
        cells: dict[str, str] = {}
        if wait := found.get("time_to_first_token"):
            cells["first, ms"] = f"{wait.value:.1f}"
            dense = wait.settings.get("dense_ms")  # older results have none
            cells["dense, ms"] = "" if dense is None else f"{_number(dense):.1f}"
        if start := found.get("start_up"):
            cells["start, s"] = f"{start.value:.1f}"
            cells["anew"] = str(start.settings.get("compilations", ""))
        if peak := found.get("peak_memory"):
            cells["peak, MB"] = f"{peak.value / 1e6:.0f}"
            cells["over"] = f"{_number(peak.settings['over_dense_weights']):+.1%}"
        step = found.get("time")
        if step is not None and step.settings.get("kl") is not None:
            cells["KL"] = f"{_number(step.settings['kl']):.1e}"
            cells["own KL"] = f"{_number(step.settings['kl_of_rounding']):.1e}"
            cells["same"] = f"{_number(step.settings['same_choice']):.0%}"
            cells["drop"] = f"{100 * _number(step.settings['sparsity_error']):+.2f}"
        out.add_row(variant, f"{sparsity:.0%}", *(cells.get(column, "") for column in columns))
    return out


def _launches(panel: Panel, row: _Row) -> Table:
    variant, sparsity = row
    out = _table(f"{variant} at {sparsity:.0%}: a step", "launch", "us", "share", "calls")
    for name, result in panel.launches[row].items():
        s = result.settings
        out.add_row(
            name, f"{result.value:.1f}", f"{_number(s['share']):.1%}", f"{_number(s['calls']):g}"
        )
    return out


def plot(panels: list[Panel], path: Path) -> None:
    """Tokens a second against realised sparsity, a picture a panel, with the limit of the bytes.

    Raises:
        DataError: If matplotlib is not installed.
    """
    figure, axes = pictures(len(panels))
    names = sorted({variant for panel in panels for variant, _ in panel.times()})
    colors = {name: f"C{number}" for number, name in enumerate(names)}  # the same in all pictures
    for panel, axis in zip(panels, axes, strict=True):
        lines: defaultdict[str, list[tuple[float, Result]]] = defaultdict(list)
        limits: dict[float, tuple[float, float]] = {}  # by target: the highest of any run
        for (variant, target), step in panel.times().items():
            dropped = _number(step.settings["realized_sparsity"])
            lines[variant].append((dropped, step))
            limit = dropped, panel.batch * 1e3 / _number(step.settings["limit_ms"])
            limits[target] = max(limits.get(target, limit), limit, key=lambda point: point[1])
        for variant, points in lines.items():
            points.sort(key=lambda point: point[0])
            rates = [panel.batch * 1e3 / r.value for _, r in points]
            slow = [panel.batch * 1e3 / r.high for _, r in points]
            fast = [panel.batch * 1e3 / r.low for _, r in points]
            axis.errorbar(
                [dropped for dropped, _ in points],
                rates,
                [
                    [rate - low for rate, low in zip(rates, slow, strict=True)],
                    [high - rate for rate, high in zip(rates, fast, strict=True)],
                ],
                label=variant, color=colors[variant], marker="o", capsize=2,
            )  # fmt: skip
        line = zip(*sorted(limits.values()), strict=True)
        axis.plot(*line, "k--", linewidth=1, label="memory limit")
        axis.set(
            title=panel.title.replace(", on ", "\n"),
            xlabel="dropped neurons, share",
            ylabel="tokens a second",
        )
        axis.title.set_fontsize(8)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    figure.savefig(path)


def _table(title: str, *columns: str) -> Table:
    # imported here: reading results needs no terminal
    from rich import box
    from rich.table import Table

    # without lines between columns, and with units below names, it fits into 80 characters
    out = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for column in columns:
        name = column in ("variant", "launch")
        out.add_column(
            column.replace(", ", "\n"), justify="left" if name else "right",
            no_wrap=column != "launch",
        )  # fmt: skip
    return out


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)
