"""Tables and words that several commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cats.report.tables import Table, cell

if TYPE_CHECKING:
    from rich.table import Table as RichTable

__all__ = ["bar", "cell", "layer_table", "loss"]

_BAR_WIDTH = 20


def bar(share: float) -> str:
    """A share in [0, 1] as a bar of blocks."""
    eighths = round(share * _BAR_WIDTH * 8)
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")


def layer_table(thresholds: dict[str, float], realized: dict[str, float]) -> RichTable:
    """One row per sparse MLP: its threshold and the share of neurons that it drops."""
    mean = sum(realized.values()) / len(realized)
    return Table(
        title="realised sparsity on held-out text",
        columns=("MLP", "threshold", "dropped", ""),
        rows=[
            [name, f"{thresholds[name]:.4f}", f"{share:.1%}", bar(share)]
            for name, share in realized.items()
        ],
        total=("mean", "", f"{mean:.1%}", bar(mean)),
        bars=True,
    ).rich()


def loss(dense: float, sparse: float) -> str:
    """How much a perplexity rises, in words."""
    return f"{sparse / dense - 1:+.1%}"
