"""Tables and words that several commands print."""

from __future__ import annotations

from rich.table import Table

_BAR_WIDTH = 20


def bar(share: float) -> str:
    """A share in [0, 1] as a bar of blocks."""
    eighths = round(share * _BAR_WIDTH * 8)
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")


def layer_table(thresholds: dict[str, float], realized: dict[str, float]) -> Table:
    """One row a sparse MLP: its threshold and the share of neurons that it drops."""
    table = Table(title="realised sparsity on held-out text", title_justify="left")
    table.add_column("MLP")
    table.add_column("threshold", justify="right")
    table.add_column("dropped", justify="right")
    table.add_column("", width=_BAR_WIDTH, no_wrap=True)
    for name, share in realized.items():
        table.add_row(name, f"{thresholds[name]:.4f}", f"{share:.1%}", bar(share))
    mean = sum(realized.values()) / len(realized)
    table.add_section()
    table.add_row("mean", "", f"{mean:.1%}", bar(mean))
    return table


def cell(value: float | None, form: str) -> str:
    """A number in a format such as ``".1%"``; empty where there is none."""
    return "" if value is None else format(value, form)


def loss(dense: float, sparse: float) -> str:
    """How much a perplexity rises, in words."""
    return f"{sparse / dense - 1:+.1%}"
