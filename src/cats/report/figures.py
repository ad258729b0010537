"""Figures as SVG that takes its ink from the page: one drawing for light and dark."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from cats.errors import DataError
from cats.report.material import Tradeoff, limit
from cats.results import COMPARED, Result

# Replaced by the colour of the page's text.
_INK = "#010203"
# Readable on white and on black.
_COLOURS = ("#3b82c4", "#d9822b", "#3a9e5c", "#c9484f", "#8f6cc0", "#8a7a3c", "#2a9d9d")
_SIZE = (4.8, 3.3)
# More lines than that are hard to tell apart.
_HISTOGRAMS = 6


def _figure(rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes ``[rows, columns]``."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("figures need matplotlib: pip install 'cats-llm[report]'") from error
    figure = Figure(figsize=(_SIZE[0] * columns, _SIZE[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.2, color=_INK)
        axis.set_prop_cycle(color=_COLOURS)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any, name: str) -> str:
    """The figure as an ``<svg>`` element; ``name`` keeps its ids apart from others' on a page."""
    import matplotlib

    buffer = io.StringIO()
    for text in figure.findobj(lambda a: hasattr(a, "set_fontsize")):
        text.set_color(_INK)
    for axis in figure.axes:
        axis.tick_params(which="both", color=_INK, labelcolor=_INK)
        for spine in axis.spines.values():
            spine.set_color(_INK)
    # text stays text: it follows the page's colour, and can be searched
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    # the width is the page's business
    return re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"(?=[^>]*>)', r"\1", text, count=2)


def _legend(axis: Any) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, framealpha=0)


def layer_labels(names: Sequence[str]) -> list[str]:
    """``"layer 0"`` for ``"model.layers.0.mlp.act_fn"``; the names themselves where two of them
    would be called the same, or one has no number."""
    numbers = [re.search(r"\.(\d+)(?:\.|$)", name) for name in names]
    labels = [f"layer {number[1]}" for number in numbers if number]
    return labels if len(set(labels)) == len(names) else list(names)


def histograms(profile: dict[str, Any], name: str) -> str:
    """Magnitudes of the activations of up to six layers, with the threshold.

    The first and the last layer are among them, and the others lie at equal distances between.
    """
    layers = profile["layers"]
    labels = layer_labels([layer["name"] for layer in layers])
    gaps = min(len(layers), _HISTOGRAMS) - 1
    chosen = [round(i * (len(layers) - 1) / gaps) for i in range(gaps + 1)] if gaps else [0]
    figure, axes = _figure()
    axis = axes[0, 0]
    for i, index in enumerate(chosen):
        layer = layers[index]
        shares = layer["histogram"]
        edges = [b / (len(shares) - 1) for b in range(len(shares) - 1)]
        colour = _COLOURS[i % len(_COLOURS)]
        axis.plot(edges, shares[:-1], drawstyle="steps-post", label=labels[index], color=colour)
        if layer["threshold"] is not None:
            axis.axvline(layer["threshold"], color=colour, linestyle=":", linewidth=1)
    axis.set(xlabel="magnitude of the activation", ylabel="share", yscale="log")
    _legend(axis)
    return _svg(figure, name)


def layers(profile: dict[str, Any], name: str) -> str:
    """Zeros and near zeros layer by layer, alone and shared by several tokens."""
    figure, axes = _figure()
    axis = axes[0, 0]
    found = profile["layers"]
    near = f"below {profile['near']:g}"
    axis.plot([layer["near_zero"] for layer in found], label=near, linestyle="--")
    axis.plot([layer["zero"] for layer in found], label="zero")
    for n in sorted({n for layer in found for n in layer["union"]}, key=int):
        shared = [layer["union"].get(n) for layer in found]
        axis.plot(shared, label=f"zero for {n} tokens at once", linewidth=1)
    axis.set(xlabel="layer", ylabel="share of activations", ylim=(0, 1))
    _legend(axis)
    return _svg(figure, name)


def positions(profile: dict[str, Any], name: str) -> str:
    """Zeros by the position in a block, as a mean over the layers."""
    figure, axes = _figure()
    axis = axes[0, 0]
    lists = [layer["by_position"] for layer in profile["layers"]]
    length = min(map(len, lists))
    means = [sum(values[i] for values in lists) / len(lists) for i in range(length)]
    axis.plot(range(length), means, marker="o", markersize=3)
    axis.set(xlabel="part of the block, first tokens first", ylabel="share of zeros", ylim=(0, 1))
    return _svg(figure, name)


def quality(
    results: Sequence[Result],
    name: str,
    *,
    label: str,
    x_label: str,
    x: Callable[[Result], float | None],
    log: bool = False,
) -> str:
    """A measure of quality of every method, over sparsity or over bytes.

    Args:
        results: One a variant.
        name: Name of the figure on its page.
        label: Of the measure.
        x_label: Of what it is drawn over.
        x: Gives that of a result; None leaves it out. The dense one is a line across.
        log: A logarithmic scale, for what grows without bound.
    """
    figure, axes = _figure()
    axis = axes[0, 0]
    lines: defaultdict[str, list[tuple[float, Result]]] = defaultdict(list)
    for result in results:
        where = x(result)
        if result.settings["method"] == "dense":
            axis.axhline(result.value, color=_INK, linestyle="--", linewidth=1, label="dense")
        elif where is not None:
            lines[str(result.settings["method"])].append((where, result))
    for method, points in lines.items():
        points.sort(key=lambda point: point[0])
        axis.errorbar(
            [where for where, _ in points],
            [r.value for _, r in points],
            [[r.value - r.low for _, r in points], [r.high - r.value for _, r in points]],
            label=method, marker="o", markersize=4, capsize=2,
            color=_COLOURS[COMPARED.index(method) - 1],
        )  # fmt: skip
    axis.set(xlabel=x_label, ylabel=label)
    if log:
        from matplotlib.ticker import LogFormatter

        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(LogFormatter())
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
    _legend(axis)
    return _svg(figure, name)


def has_lines(results: Sequence[Result]) -> bool:
    """Whether some variant was timed at two sparsities: one point says no more than a table."""
    at: defaultdict[Any, set[float]] = defaultdict(set)
    for r in results:
        at[r.settings["variant"]].add(float(r.settings["sparsity"] or 0))
    return any(len(sparsities) > 1 for sparsities in at.values())


def times(results: Sequence[Result], name: str) -> str:
    """Time over sparsity of every variant, with the limit that its bytes set."""
    figure, axes = _figure()
    axis = axes[0, 0]
    lines: defaultdict[str, list[Result]] = defaultdict(list)
    limits: dict[float, float] = {}
    for result in sorted(results, key=lambda r: float(r.settings["sparsity"] or 0)):
        sparsity = float(result.settings["sparsity"] or 0)
        lines[str(result.settings["variant"])].append(result)
        bound = limit(result)
        if bound is not None:
            limits[sparsity] = bound
    for i, (variant, points) in enumerate(lines.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        if len(points) == 1:
            axis.axhline(points[0].value, linestyle=":", color=colour, label=variant)
            continue
        axis.errorbar(
            [float(r.settings["sparsity"] or 0) for r in points],
            [r.value for r in points],
            [[r.value - r.low for r in points], [r.high - r.value for r in points]],
            label=variant, marker="o", markersize=4, capsize=2, color=colour,
        )  # fmt: skip
    if limits:
        axis.plot([*limits], [*limits.values()], color=_INK, linestyle="--", label="memory limit")
    axis.set(xlabel="sparsity", ylabel=results[0].unit)
    axis.set_ylim(bottom=0)
    _legend(axis)
    return _svg(figure, name)


def tradeoff(found: Tradeoff, name: str) -> str:
    """Perplexity against measured speed: dense and sparse, one line for each loop."""
    figure, axes = _figure()
    axis = axes[0, 0]
    for i, (loop, (dense, sparse)) in enumerate(found.times.items()):
        speeds = [found.speed(time) for time in (dense, sparse)]
        lows = [v - found.speed(t, t.high) for v, t in zip(speeds, (dense, sparse), strict=True)]
        highs = [found.speed(t, t.low) - v for v, t in zip(speeds, (dense, sparse), strict=True)]
        perplexities = [found.dense.value, found.sparse.value]
        axis.errorbar(
            speeds, perplexities, xerr=[lows, highs], label=loop, marker="o", markersize=4,
            capsize=2, color=_COLOURS[i % len(_COLOURS)],
        )  # fmt: skip
        # above the upper point and below the lower one: away from the line between them
        above = 1 if found.sparse.value >= found.dense.value else -1
        for speed, value, label, side in zip(
            speeds, perplexities, found.labels, (-above, above), strict=True
        ):
            axis.annotate(
                label, (speed, value), (0, 6 * side), textcoords="offset points", fontsize=8,
                ha="center", va="bottom" if side > 0 else "top",
            )  # fmt: skip
    axis.set(xlabel="tokens per second (right is faster)", ylabel="perplexity (lower is better)")
    axis.margins(x=0.1, y=0.2)
    axis.set_xlim(left=0)
    # above the frame: inside, it would hide a point
    axis.legend(fontsize=8, framealpha=0, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return _svg(figure, name)
