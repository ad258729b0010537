"""Fine-tuning: a table of runs, and their curves over steps and tokens in one picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cats.errors import DataError
from cats.history import History, names_of, recovered
from cats.report import plots
from cats.report.tables import Table, cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def table(histories: Mapping[str, History]) -> Table:
    """Log-perplexity before and after fine-tuning, one row per run.

    Raises:
        DataError: If no run is complete.
    """
    runs = {name: history for name, history in histories.items() if history.complete}
    if not runs:
        raise DataError("there is no complete history of a fine-tuning to quote")
    texts, tasks = names_of(runs.values())
    first = next(iter(runs.values()))
    rows = []
    for name, history in runs.items():
        start, end = history.points[0], history.points[-1]
        cells = []
        for text in texts:
            share = recovered(history, runs.values(), text)
            change = f"{start.losses[text]:.4f} > {end.losses[text]:.4f}"
            cells.append(change + ("" if share is None else f" ({share:.0%})"))
        cells += [cell(end.accuracy.get(task), ".1%") for task in tasks]
        rows.append([name, str(end.step), f"{end.tokens:,}", *cells, cell(end.sparsity, ".1%")])
    return Table(
        title=f"{first.environment['device']}, {first.settings['model']}, "
        f"{first.settings['dtype']}: log-perplexity before and after (share of the loss against "
        "dense that is recovered)",
        columns=["run", "steps", "tokens", *texts, *(f"{t}, right" for t in tasks), "dropped"],
        rows=rows,
    )


def curves(histories: Mapping[str, History]) -> Figure:
    """One row per evaluated text, over steps on the left and tokens on the right.

    A run keeps its colour in every panel.

    Args:
        histories: Label of each run to its history.

    Raises:
        DataError: If no run has a point.
    """
    texts, _ = names_of(histories.values())
    if not texts:
        raise DataError("the histories hold no evaluation to draw")
    label_of = {"step": "steps", "tokens": "tokens"}
    figure, axes = plots.figure(len(texts), 2)
    for row, text in enumerate(texts):
        for column, measure in enumerate(label_of):
            axis = axes[row][column]
            for i, (label, history) in enumerate(histories.items()):
                points = [p for p in history.points if text in p.losses]
                xs, losses = [getattr(p, measure) for p in points], [p.losses[text] for p in points]
                distilled = history.settings["options"]["distillation"]
                style = "o--" if distilled else "o-"
                axis.plot(xs, losses, style, label=label, markersize=3, color=plots.colour(i))
            plots.label(axis, x=label_of[measure], y=f"log-perplexity, {text}")
            # whole steps, and the losses themselves instead of their distance from an offset
            axis.locator_params(axis="x", integer=True)
            axis.ticklabel_format(useOffset=False)
            low, high = _range(histories, text)
            axis.set_ylim(low, high)
            if high is not None:
                axis.set_title("first points lie above the frame", fontsize=8)
    plots.legend(axes[0][0])
    return figure


def _range(histories: Mapping[str, History], text: str) -> tuple[float | None, float | None]:
    """Ends of the axis. A far higher start of a run is left out: it would hide differences."""
    losses = [[p.losses[text] for p in h.points if text in p.losses] for h in histories.values()]
    every = [loss for run in losses for loss in run]
    later = [loss for run in losses for loss in run[1:]]
    room = max(later, default=0.0) - min(every, default=0.0)
    if room <= 0:
        return None, None
    top = min(every) + 1.6 * room
    return (min(every) - 0.1 * room, top) if max(every) > top else (None, None)
