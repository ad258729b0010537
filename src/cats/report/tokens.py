"""Tables and plot of ``cats bench decode``, from its results alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from cats.errors import DataError
from cats.report import plots
from cats.report.tables import Table, cell, points
from cats.results import (
    DecodeBandwidth,
    DecodeResult,
    DecodeVariantResult,
    FirstTokenTime,
    LaunchTime,
    PeakMemory,
    Result,
    StartUpTime,
    TokenTime,
    run_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What the columns mean; it stands below the tables.
LEGEND = """\
spread: distance of the quartiles over the median. x dense: speed over the fastest loop of the
dense model, timed in turns in the same run. limit: share of the rate at which memory could
deliver the bytes. first: time of the first token. dense: the shortest of a dense loop, timed in
turns. start: from the first call to its third token. anew: graphs compiled for it. over: peak
of memory over the dense model's weights. KL: divergence of each step from the model's modules
on the same tokens. own KL: of these modules, run token by token. same: share of equal choices.
drop: sparsity above that of the modules, in percentage points."""

_SPEED = ("variant", "target", "dropped", "tok/s", "ms", "spread", "x dense", "GB/s", "limit")
_COSTS = ("variant", "target", "first, ms", "dense, ms", "start, s", "anew", "peak, MB", "over")
# device, model, dtype, batch, prompt length, new tokens
_Key = tuple[str, str, str, int, int, int]
# variant, target sparsity
_Row = tuple[str, float]
_R = TypeVar("_R", bound=DecodeVariantResult)


class Panel:
    """The results of one model, dtype and prompt on one device.

    Of each row, the last run counts. Rows may be of different runs, which are not compared with
    each other.

    Attributes:
        rows: Variant and target to one result of each type, all of one run.
        launches: Variant and target to one result for each kernel.
        bandwidths: The read bandwidth of each run, GB/s.
    """

    def __init__(self, key: _Key) -> None:
        self.device, self.model, self.dtype, self.batch, self.prompt_length, _ = key
        self.rows: defaultdict[_Row, list[DecodeVariantResult]] = defaultdict(list)
        self.launches: defaultdict[_Row, dict[str, LaunchTime]] = defaultdict(dict)
        self.bandwidths: dict[str, float] = {}

    @property
    def title(self) -> str:
        case = f"batch {self.batch}, prompt {self.prompt_length:,}"
        return f"{self.model}, {self.dtype}, {case}, on {self.device}"

    def add(self, r: DecodeResult) -> None:
        if isinstance(r, DecodeBandwidth):
            self.bandwidths[run_of(r)] = r.value
        elif isinstance(r, LaunchTime):
            self.launches[r.variant, r.sparsity][r.kernel] = r
        elif isinstance(r, DecodeVariantResult):
            row = r.variant, r.sparsity
            if isinstance(r, TokenTime):
                # a new run begins: results of an earlier one do not stand beside its own
                self.launches.pop(row, None)
                self.rows[row].clear()
            self.rows[row].append(r)

    def of(self, row: _Row, kind: type[_R]) -> _R | None:
        """The last result of a row that is of this type."""
        return next((r for r in reversed(self.rows[row]) if isinstance(r, kind)), None)

    def times(self) -> dict[_Row, TokenTime]:
        times = {row: self.of(row, TokenTime) for row in self.rows}
        return {row: time for row, time in times.items() if time is not None}

    @property
    def runs(self) -> list[str]:
        """The runs that the rows are of."""
        return list(dict.fromkeys(map(run_of, self.times().values())))


def panels(results: Iterable[Result]) -> list[Panel]:
    """Results of this benchmark grouped by what a reader compares.

    Raises:
        DataError: If there are none.
    """
    groups: dict[_Key, Panel] = {}
    for r in results:
        if isinstance(r, DecodeResult):
            key = r.device, r.model_and_bits, r.dtype, r.batch, r.prompt_length, r.new_tokens
            groups.setdefault(key, Panel(key)).add(r)
    if not groups:
        raise DataError("no result of `cats bench decode` in the file")
    return list(groups.values())


def tables(panel: Panel) -> list[Table]:
    """Speed, other costs, the check of our own loops, and the launches of a step."""
    checks = _checks(panel)
    launches = (_launches(panel, row) for row in panel.launches)
    return [_speed(panel), _costs(panel), *([checks] if checks.rows else []), *launches]


def _speed(panel: Panel) -> Table:
    """Each way to generate beside the fastest dense loop and the memory's limit."""
    rates = [f"{panel.bandwidths[run]:.0f}" for run in panel.runs if run in panel.bandwidths]
    reads = f": reads {', '.join(rates)} GB/s" if rates else ""
    several = f" ({len(panel.runs)} runs)" if len(panel.runs) > 1 else ""
    rows = []
    for (variant, sparsity), step in panel.times().items():
        cells = {
            "variant": variant,
            "target": f"{sparsity:.0%}",
            "dropped": f"{step.realized_sparsity:.1%}",
            "tok/s": f"{step.tokens_per_second:.1f}",
            "ms": f"{step.value:.2f}",
            "spread": f"{(step.high - step.low) / step.value:.0%}",
            "x dense": cell(step.speedup, ".2f"),
            "GB/s": f"{step.bytes / step.value / 1e6:.0f}",
            "limit": f"{step.limit_ms / step.value:.2f}",
        }
        rows.append([cells[column] for column in _SPEED])
    return Table(title=panel.title + reads + several, columns=_SPEED, rows=rows)


def _costs(panel: Panel) -> Table:
    """First token, start-up and memory."""
    rows = []
    for row in panel.rows:
        cells = dict.fromkeys(_COSTS, "") | {"variant": row[0], "target": f"{row[1]:.0%}"}
        if first := panel.of(row, FirstTokenTime):
            cells |= {
                "first, ms": f"{first.value:.1f}",
                "dense, ms": cell(first.dense_ms, ".1f"),
            }
        if start := panel.of(row, StartUpTime):
            cells |= {"start, s": f"{start.value:.1f}", "anew": str(start.compilations)}
        if peak := panel.of(row, PeakMemory):
            cells |= {
                "peak, MB": f"{peak.value / 1e6:.0f}",
                "over": f"{peak.over_dense_weights:+.1%}",
            }
        rows.append(cells)
    # the peak of a CPU's memory is not measured
    on_gpu = any(row["peak, MB"] for row in rows)
    columns = [name for name in _COSTS if on_gpu or name not in ("peak, MB", "over")]
    return Table(columns=columns, rows=[[row[column] for column in columns] for row in rows])


def _checks(panel: Panel) -> Table:
    """How far the steps of our own loops are from the model's modules."""
    return Table(
        columns=("variant", "target", "KL", "own KL", "same", "drop"),
        rows=[
            [
                variant,
                f"{sparsity:.0%}",
                f"{step.kl:.1e}",
                cell(step.kl_of_rounding, ".1e"),
                cell(step.same_choice, ".0%"),
                points(step.sparsity_error),
            ]
            for (variant, sparsity), step in panel.times().items()
            if step.kl is not None
        ],
    )


def _launches(panel: Panel, row: _Row) -> Table:
    variant, sparsity = row
    return Table(
        title=f"{variant} at {sparsity:.0%}: a step",
        columns=("launch", "us", "share", "calls"),
        rows=[
            [name, f"{launch.value:.1f}", f"{launch.share:.1%}", f"{launch.calls:g}"]
            for name, launch in panel.launches[row].items()
        ],
        wrap=True,
    )


def summary(models: Sequence[Panel]) -> Table:
    """Tokens per second through the loop, one row for each model and variant.

    A row names its batch or prompt if it is not that of the title.
    """
    batch, prompt = models[0].batch, models[0].prompt_length
    sparsities = sorted({sparsity for panel in models for _, sparsity in panel.times()})
    dtypes = ", ".join(dict.fromkeys(panel.dtype for panel in models))
    rows = []
    for panel in models:
        times = panel.times()
        model = panel.model
        if dtypes != panel.dtype:
            model += f", {panel.dtype}"
        if panel.batch != batch:
            model += f", batch {panel.batch}"
        if panel.prompt_length != prompt:
            model += f", prompt {panel.prompt_length:,}"
        for variant in dict.fromkeys(variant for variant, _ in times):
            steps = [times.get((variant, sparsity)) for sparsity in sparsities]
            rows.append([model, variant, *map(_rate_cell, steps)])
    return Table(
        title=f"{models[0].device}, {dtypes}, batch {batch}, prompt {prompt}: tokens per second "
        "(fraction of the memory limit, speed-up over the fastest dense loop of the same run)",
        columns=["model", "", *(f"{sparsity:.0%}" for sparsity in sparsities)],
        rows=rows,
        names=2,
    )


def _rate_cell(step: TokenTime | None) -> str:
    if step is None:
        return ""
    faster = "" if step.speedup is None else f", {step.speedup:.2f}x"
    return f"{step.tokens_per_second:.1f} ({step.limit_ms / step.value:.2f}{faster})"


def plot(models: Sequence[Panel]) -> Figure:
    """Tokens per second over realised sparsity, a picture for each panel.

    Raises:
        DataError: If matplotlib is not installed.
    """
    figure, axes = plots.panels(len(models))
    names = sorted({variant for panel in models for variant, _ in panel.times()})
    # a variant has the same colour in all pictures
    colours = {name: plots.colour(number) for number, name in enumerate(names)}
    for panel, axis in zip(models, axes, strict=True):
        draw(axis, list(panel.times().values()), colours=colours, title=panel.title)
    return figure


def draw(
    axis: Axes, steps: Sequence[TokenTime], *, colours: dict[str, str], title: str = ""
) -> None:
    """Tokens per second over the dropped share, with the limit that the bytes set."""
    lines: defaultdict[str, list[TokenTime]] = defaultdict(list)
    limits: dict[float, tuple[float, float]] = {}  # target to the highest limit of any run
    for step in sorted(steps, key=lambda step: step.realized_sparsity):
        lines[step.variant].append(step)
        limit = step.realized_sparsity, step.rate(step.limit_ms)
        limits[step.sparsity] = max(limits.get(step.sparsity, limit), limit, key=lambda p: p[1])
    for variant, line in lines.items():
        rates = [
            (s.realized_sparsity, s.rate(s.value), s.rate(s.high), s.rate(s.low)) for s in line
        ]
        plots.line(axis, rates, label=variant, colour=colours[variant])
    plots.limit(axis, dict(limits.values()))
    plots.label(axis, x="share of dropped neurons", y="tokens per second", title=title)
    # room for the legend above the lines
    axis.set_ylim(0, 1.3 * axis.get_ylim()[1])
    plots.legend(axis)
