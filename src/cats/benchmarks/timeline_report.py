"""Table and picture of ``cats bench timeline``, made from its results alone."""

from collections.abc import Iterable
from pathlib import Path

from rich.table import Table

from cats.benchmarks.pictures import pictures
from cats.benchmarks.timeline import EVENTS, LAUNCHES, NAME
from cats.errors import DataError
from cats.results import Result

# device, model, dtype, sparsity, context
_Key = tuple[str, str, str, float, int]


class Panel:
    """The moments of a layer of one model; the last results count."""

    def __init__(self, key: _Key) -> None:
        device, model, dtype, sparsity, context = key
        target = f"CATS-{round(100 * sparsity)}" if sparsity else "dense"
        self.title = f"{model}, {dtype}, {target}, context {context:,}, on {device}"
        self.moments: dict[tuple[str, str], Result] = {}


def panels(results: Iterable[Result]) -> list[Panel]:
    """Results of this benchmark, by model, sparsity and context; none of other benchmarks."""
    groups: dict[_Key, Panel] = {}
    for result in results:
        if result.benchmark != NAME:
            continue
        s = result.settings
        key: _Key = (
            str(result.environment["device"]), str(s["model"]), str(s["dtype"]),
            float(s["sparsity"] or 0), int(s["context"] or 0),
        )  # fmt: skip
        panel = groups.setdefault(key, Panel(key))
        panel.moments[str(s["launch"]), str(s["event"])] = result
    return list(groups.values())


def table(panel: Panel) -> Table:
    """Microseconds behind the end of the layer before: the median warp, the first and the last."""
    caption = "us behind the layer before: the median warp, below it the first and the last"
    out = Table(title=panel.title, caption=caption)
    for column in ("launch", "starts", "has its input", "last weights", "ends"):
        out.add_column(column, justify="left" if column == "launch" else "right")
    for launch in LAUNCHES:
        cells = []
        for event in EVENTS:
            moment = panel.moments.get((launch, event))
            cells.append("" if moment is None else _cell(moment))
        out.add_row(launch, *cells)
    return out


def _cell(moment: Result) -> str:
    return f"{moment.value:.1f}\n{moment.low:.1f} .. {moment.high:.1f}"


def plot(panels: list[Panel], path: Path) -> None:
    """A bar a launch: pale until the median warp has its input, thin while warps end.

    Raises:
        DataError: If there is nothing to draw, or matplotlib is not installed.
    """
    if not panels:
        raise DataError("no result of `cats bench timeline` in the file")
    figure, axes = pictures(len(panels), height=2.4)
    for panel, axis in zip(panels, axes, strict=True):
        for row, launch in enumerate(LAUNCHES):
            found = {event: panel.moments.get((launch, event)) for event in EVENTS}
            start, given, end = found["start"], found["input"], found["end"]
            if start is None or given is None or end is None:
                continue
            color = f"C{row}"
            axis.barh(row, given.value - start.value, left=start.value, color=color, alpha=0.3)
            axis.barh(row, end.low - given.value, left=given.value, color=color)
            axis.barh(row, end.high - end.low, left=end.low, color=color, height=0.3)
        axis.set_yticks(range(len(LAUNCHES)), LAUNCHES)
        axis.invert_yaxis()
        axis.set(
            title=panel.title.replace(", on ", "\n"),
            xlabel="us behind the layer before; pale: waits for its input",
        )
        axis.title.set_fontsize(8)
    figure.savefig(path)
