"""Curves of fine-tuning: log-perplexity over steps and tokens, several runs in one picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from cats.errors import DataError
from cats.history import History
from cats.report.figures import _COLOURS, _figure, _legend, _svg


def curves_figure(histories: Mapping[str, History], name: str) -> str:
    """One row an evaluated text, over steps on the left and tokens on the right, as SVG.

    A run keeps its colour in every panel.

    Args:
        histories: Label of each run to its history.
        name: Name of the figure on its page.

    Raises:
        DataError: If no run has a point.
    """
    texts = list(dict.fromkeys(t for h in histories.values() for p in h.points for t in p.losses))
    if not texts:
        raise DataError("the histories hold no evaluation to draw")
    label_of = {"step": "steps", "tokens": "tokens"}
    figure, axes = _figure(len(texts), 2)
    for row, text in enumerate(texts):
        for column, measure in enumerate(label_of):
            axis = axes[row, column]
            for i, (label, history) in enumerate(histories.items()):
                points = [p for p in history.points if text in p.losses]
                axis.plot(
                    [getattr(p, measure) for p in points],
                    [p.losses[text] for p in points],
                    label=label, marker="o", markersize=3, color=_COLOURS[i % len(_COLOURS)],
                    linestyle="--" if history.settings["options"]["distillation"] else "-",
                )  # fmt: skip
            axis.set(xlabel=label_of[measure], ylabel=f"log-perplexity, {text}")
            # whole steps, and the losses themselves rather than what they have more than another
            axis.locator_params(axis="x", integer=True)
            axis.ticklabel_format(useOffset=False)
    _legend(axes[0, 0])
    return _svg(figure, name)


def best_runs(histories: Mapping[str, History]) -> dict[str, History]:
    """Of runs that differ in their learning rate alone, the one with the lowest last loss.

    The first evaluated text decides.
    """
    best: dict[str, tuple[float, str, History]] = {}
    for name, history in histories.items():
        if not history.points or not history.points[-1].losses:
            continue
        key = _all_but_the_learning_rate(history)
        loss = next(iter(history.points[-1].losses.values()))
        if key not in best or loss < best[key][0]:
            best[key] = (loss, name, history)
    return {name: history for _, name, history in best.values()}


def _all_but_the_learning_rate(history: History) -> str:
    settings = {name: value for name, value in history.settings.items() if name != "run"}
    settings["options"] = {**settings["options"], "learning_rate": None}
    return json.dumps(settings, sort_keys=True)


def recovered(history: History, others: Iterable[History], text: str) -> float | None:
    """Share of a sparse model's loss on a text that fine-tuning takes back.

    The loss is what the untuned sparse model has more than the lower of the untuned dense model and
    the best dense run; None for a dense run, or where none is there to compare with.
    """
    dense = [
        point.losses[text]
        for other in others
        if other.settings["method"] == "dense"
        for point in other.points
        if text in point.losses
    ]
    if history.settings["method"] == "dense" or not dense or not history.points:
        return None
    first, last = history.points[0].losses.get(text), history.points[-1].losses.get(text)
    if first is None or last is None or first <= min(dense):
        return None
    return (first - last) / (first - min(dense))
