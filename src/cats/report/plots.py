"""The look of every plot: axes, colours, legends, lines with quartiles; and its file.

The ink is the colour of the page's text (``currentColor``): one drawing for light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cats.errors import ConfigError, DataError
from cats.storage import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Replaced by the colour of the page's text.
INK = "#010203"
# Readable on white and on black.
COLOURS = ("#3b82c4", "#d9822b", "#3a9e5c", "#c9484f", "#8f6cc0", "#8a7a3c", "#2a9d9d")
_SIZE = (4.8, 3.3)
# The ink of a file that stands alone: no page gives it a colour.
_OWN_INK = "<style>svg{color:#1c1c1c}@media(prefers-color-scheme:dark){svg{color:#e4e4e4}}</style>"


def colour(number: int) -> str:
    """The colour of a line; after the last colour comes the first one again."""
    return COLOURS[number % len(COLOURS)]


def figure(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float] = _SIZE
) -> tuple[Figure, list[list[Axes]]]:
    """A figure and its axes, ``axes[row][column]``; ``size`` is that of each in inches.

    Raises:
        DataError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("plots need matplotlib: pip install 'cats-llm[report]'") from error
    drawing = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = drawing.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.2, color=INK)
        axis.set_axisbelow(True)
        axis.set_prop_cycle(color=COLOURS)
        axis.spines[["top", "right"]].set_visible(False)
    return drawing, axes.tolist()


def single() -> tuple[Figure, Axes]:
    """A figure with one picture.

    Raises:
        DataError: If matplotlib is not installed.
    """
    drawing, ((axis,),) = figure()
    return drawing, axis


def panels(count: int, *, size: tuple[float, float] = _SIZE) -> tuple[Figure, list[Axes]]:
    """A figure and ``count`` axes in it, two per row.

    Raises:
        DataError: If matplotlib is not installed.
    """
    columns = min(count, 2)
    drawing, grid = figure(-(-count // columns), columns, size=size)
    axes = [axis for row in grid for axis in row]
    for axis in axes[count:]:
        axis.remove()
    return drawing, axes[:count]


def line(
    axis: Axes, points: Iterable[tuple[float, float, float, float]], *, label: str, colour: str
) -> None:
    """Draw a line through points ``(x, value, low, high)``, with bars from low to high."""
    xs, values, lows, highs = zip(*points, strict=True)
    below = [value - low for value, low in zip(values, lows, strict=True)]
    above = [high - value for value, high in zip(values, highs, strict=True)]
    axis.errorbar(
        xs, values, [below, above], label=label, color=colour, marker="o", markersize=4, capsize=2
    )


def limit(axis: Axes, points: Mapping[float, float]) -> None:
    """Draw the memory's limit, by x, as a dashed line."""
    if points:
        xs, values = zip(*sorted(points.items()), strict=True)
        axis.plot(xs, values, color=INK, linestyle="--", linewidth=1, label="memory limit")


def label(axis: Axes, *, x: str, y: str = "", title: str = "") -> None:
    """Name the axes, and add a title. A long title is broken at its commas."""
    axis.set(xlabel=x, ylabel=y)
    if title:
        axis.set_title(_broken(title), fontsize=8)


def legend(axis: Axes, **options: Any) -> None:
    """Add a legend if a line has a label; options as matplotlib takes them."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, framealpha=0, **options)


def svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element. Its ids begin with ``name``, unique on a page."""
    import matplotlib
    from matplotlib.text import Text

    buffer = io.StringIO()
    for artist in figure.findobj():
        if isinstance(artist, Text):
            artist.set_color(INK)
    for axis in figure.axes:
        axis.tick_params(which="both", color=INK, labelcolor=INK)
        for spine in axis.spines.values():
            spine.set_color(INK)
    # text stays text: it follows the page's colour, and can be searched
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    # the page sets the width
    return re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"(?=[^>]*>)', r"\1", text, count=2)


def check_name(path: Path) -> None:
    """
    Raises:
        ConfigError: If a file of this name cannot hold a plot.
    """
    if path.suffix not in (".svg", ".png"):
        raise ConfigError(f"{path}: name a picture .svg or .png")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a file of its own, SVG or PNG.

    Raises:
        ConfigError: If its name ends in something else.
        StorageError: If it cannot be written.
    """
    check_name(path)
    with replacing(path) as temporary:
        if path.suffix == ".png":
            figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})
        else:
            temporary.write_text(alone(svg(figure, path.stem)), "utf-8")


def alone(svg: str) -> str:
    """An ``<svg>`` element as a file of its own, which sets its colour of text."""
    return re.sub(r"(<svg[^>]*>)", rf"\1{_OWN_INK}", svg, count=1)


def _broken(title: str, width: int = 60) -> str:
    """The title with line breaks between phrases."""
    lines = [""]
    for phrase in title.split(", "):
        longer = f"{lines[-1]}, {phrase}" if lines[-1] else phrase
        if len(longer) > width and lines[-1]:
            lines[-1] += ","
            lines.append(phrase)
        else:
            lines[-1] = longer
    return "\n".join(lines)
