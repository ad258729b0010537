"""Pictures side by side, one a panel."""

from typing import Any

from cats.errors import DataError


def pictures(count: int, *, height: float = 4) -> tuple[Any, list[Any]]:
    """A matplotlib figure and ``count`` axes in it, two a row, each ``height`` inches high.

    Raises:
        DataError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("plots need matplotlib: pip install 'cats-llm[report]'") from error
    columns = min(count, 2)
    rows = -(-count // columns)
    figure = Figure(figsize=(5 * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]
