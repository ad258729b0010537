"""Table and plot of ``cats bench timeline``, from its results alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from cats.errors import DataError
from cats.report import plots
from cats.report.tables import Table
from cats.results import EVENTS, LAUNCHES, Moment, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# device, model, dtype, sparsity, context
_Key = tuple[str, str, str, float, int]


class Panel:
    """The moments of a layer of one model. Of each moment, the last result counts."""

    def __init__(self, key: _Key) -> None:
        device, model, dtype, sparsity, context = key
        target = f"CATS-{round(100 * sparsity)}" if sparsity else "dense"
        self.title = f"{model}, {dtype}, {target}, context {context:,}, on {device}"
        self.moments: dict[tuple[str, str], Moment] = {}


def panels(results: Iterable[Result]) -> list[Panel]:
    """Results of this benchmark, by model, sparsity and context; other results are left out."""
    groups: dict[_Key, Panel] = {}
    for r in results:
        if isinstance(r, Moment):
            key = r.device, r.model, r.dtype, r.sparsity, r.context
            groups.setdefault(key, Panel(key)).moments[r.launch, r.event] = r
    return list(groups.values())


def table(panel: Panel) -> Table:
    """Microseconds after the end of the layer before: the median warp, the first and the last."""
    return Table(
        title=panel.title,
        caption="us after the layer before: the median warp, below it the first and the last",
        columns=("launch", "starts", "has its input", "last weights", "ends"),
        rows=[
            [launch, *(_cell(panel.moments.get((launch, event))) for event in EVENTS)]
            for launch in LAUNCHES
        ],
    )


def _cell(moment: Moment | None) -> str:
    if moment is None:
        return ""
    return f"{moment.value:.1f}\n{moment.low:.1f} .. {moment.high:.1f}"


def plot(layers: Sequence[Panel]) -> Figure:
    """A bar for each launch: pale until the median warp has its input, thin while warps end.

    Raises:
        DataError: If there is nothing to draw, or matplotlib is not installed.
    """
    if not layers:
        raise DataError("no result of `cats bench timeline` in the file")
    figure, axes = plots.panels(len(layers), size=(4.8, 2.4))
    for panel, axis in zip(layers, axes, strict=True):
        for row, launch in enumerate(LAUNCHES):
            start, ready, _, end = (panel.moments.get((launch, event)) for event in EVENTS)
            if start is None or ready is None or end is None:
                continue
            colour = plots.colour(row)
            waiting, ending = ready.value - start.value, end.high - end.low
            axis.barh(row, waiting, left=start.value, color=colour, alpha=0.3)
            axis.barh(row, end.low - ready.value, left=ready.value, color=colour)
            axis.barh(row, ending, left=end.low, color=colour, height=0.3)
        axis.set_yticks(range(len(LAUNCHES)), LAUNCHES)
        axis.invert_yaxis()
        x = "us after the layer before; pale: waits for its input"
        plots.label(axis, x=x, title=panel.title)
    return figure
