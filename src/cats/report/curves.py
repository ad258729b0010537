"""Curves of fine-tuning: log-perplexity over steps and tokens, several runs in one picture."""

from __future__ import annotations

from collections.abc import Mapping

from cats.errors import DataError
from cats.history import History, names_of
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
    texts, _ = names_of(histories.values())
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
            low, high = _range(histories, text)
            axis.set_ylim(low, high)
            if high is not None:
                axis.set_title("first points lie above the frame", fontsize=8)
    _legend(axes[0, 0])
    return _svg(figure, name)


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
