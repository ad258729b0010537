"""The tables of the page, and its figures of speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cats.report import mlp, plots, tokens
from cats.report.material import Time
from cats.report.quality import Quality
from cats.report.tables import Table, plus_minus
from cats.results import MEAN, DemoTime, Perplexity, TaskScore, TokenTime


def has_lines(group: Sequence[Time]) -> bool:
    """Whether some variant was timed at two sparsities, so that a figure has a line."""
    variants = [r.variant for r in group]
    return len(variants) > len(set(variants))


def times(group: Sequence[Time], name: str) -> str:
    """Tokens per second, or times of one unit, over sparsity, as SVG."""
    figure, axis = plots.single()
    steps = [r for r in group if isinstance(r, TokenTime)]
    if steps:
        variants = dict.fromkeys(r.variant for r in steps)
        colours = {variant: plots.colour(number) for number, variant in enumerate(variants)}
        tokens.draw(axis, steps, colours=colours)
    else:
        mlp.draw(axis, group)
    return plots.svg(figure, name)


def perplexity_rows(group: Sequence[Perplexity]) -> list[list[str]]:
    dense = next((r.value for r in group if r.method == "dense"), None)
    return [
        [
            r.variant,
            f"{r.value:,.3f}",
            "" if dense is None or r.value == dense else f"{r.value / dense - 1:+,.1%}",
            f"{r.mlp_share:.1%}",
            f"{r.token_bytes / 1e6:,.1f}",
        ]
        for r in group
    ]


def calibration(group: Sequence[Quality]) -> str:
    """Where the group was measured, and on what its thresholds were calibrated."""
    device = f"On {group[0].device}. "
    sparse = next((r for r in group if r.method != "dense"), None)
    if sparse is None:
        return device
    if sparse.calibration_samples is None:
        count = sparse.calibration_tokens
        return device if count is None else f"{device}Calibrated on {count:,} tokens."
    return (
        f"{device}Calibrated on {sparse.calibration_samples} blocks of "
        f"{sparse.calibration_length} tokens of {sparse.calibration_text}, "
        f"seed {sparse.calibration_seed}."
    )


def task_table(group: Sequence[TaskScore], title: str, cell: Callable[[TaskScore], str]) -> Table:
    """One row per variant, one column per task, the mean first."""
    tasks: dict[str, str] = {}
    rows: dict[str, dict[str, str]] = {}
    # the mean is last in the results; as the first column it stays in sight on a narrow page
    for r in sorted(group, key=lambda r: r.task != MEAN):
        tasks[r.task] = f"{r.task} ({r.split}, {r.samples:,})" if r.split else r.task
        rows.setdefault(r.variant, {})[r.task] = cell(r)
    return Table(
        columns=[title, *tasks.values()],
        rows=[[variant, *(row.get(task, "") for task in tasks)] for variant, row in rows.items()],
    )


def score(r: TaskScore) -> str:
    return plus_minus(f"{100 * r.value:.1f}", r.stderr, ".1f")


def difference(r: TaskScore) -> str:
    if r.method == "dense":
        return ""
    return plus_minus(f"{100 * r.difference:+.1f}", r.difference_stderr, ".1f")


def time_row(r: Time) -> list[str]:
    limit = "" if r.limit is None else _four_digits(r.limit)
    return [
        f"{r.ran}, {r.variant}" if isinstance(r, DemoTime) else r.variant,
        f"{r.sparsity:.0%}",
        _four_digits(r.value),
        f"{_four_digits(r.low)} to {_four_digits(r.high)}",
        limit,
        "" if r.limit is None else f"{r.limit / r.value:.2f}",
    ]


def _four_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
