"""Fine-tuning: a table of runs, and their curves over steps and tokens in one picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cats.errors import DataError
from cats.history import History, names_of, recovered
from cats.report import plots
from cats.report.tables import Table, cell


def table(found: Mapping[str, History]) -> Table:
    """Log-perplexity before and after fine-tuning, one row per run.

    Raises:
        DataError: If there is no run that came to its end.
    """
    runs = {name: history for name, history in found.items() if history.complete}
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


def curves(histories: Mapping[str, History]) -> Any:
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
            axis = axes[row, column]
            for i, (label, history) in enumerate(histories.items()):
                points = [p for p in history.points if text in p.losses]
                axis.plot(
                    [getattr(p, measure) for p in points],
                    [p.losses[text] for p in points],
                    label=label, marker="o", markersize=3, color=plots.colour(i),
                    linestyle="--" if history.settings["options"]["distillation"] else "-",
                )  # fmt: skip
            plots.label(axis, x=label_of[measure], y=f"log-perplexity, {text}")
            # whole steps, and the losses themselves rather than what they have more than another
            axis.locator_params(axis="x", integer=True)
            axis.ticklabel_format(useOffset=False)
            low, high = _range(histories, text)
            axis.set_ylim(low, high)
            if high is not None:
                axis.set_title("first points lie above the frame", fontsize=8)
    plots.legend(axes[0, 0])
    return figure


def _range(histories: Mapping[str, History], text: str) -> tuple[float | None, float | None]:
    """Ends of the axis: a run may start above it, and then leaves the others room to differ."""
    losses = [[p.losses[text] for p in h.points if text in p.losses] for h in histories.values()]
    all_of = [loss for run in losses for loss in run]
    later = [loss for run in losses for loss in run[1:]]
    room = max(later, default=0.0) - min(all_of, default=0.0)
    if room <= 0:
        return None, None
    top = min(all_of) + 1.6 * room
    return (min(all_of) - 0.1 * room, top) if max(all_of) > top else (None, None)
