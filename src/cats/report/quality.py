"""Quality of every variant: tables for documents, and the two figures that compare variants."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cats.errors import DataError
from cats.report import plots
from cats.report.material import Tradeoff
from cats.report.tables import Table, cell, plus_minus, points
from cats.results import COMPARED, MEAN, Perplexity, TaskScore, read_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Quality = Perplexity | TaskScore


def read_quality(folder: Path) -> list[Quality]:
    """The perplexities and task scores of ``cats reproduce`` or ``cats evaluate -o``.

    Raises:
        DataError: If there is none of the dense model.
    """
    files = sorted((folder / "perplexity").glob("*.jsonl"))
    # cats reproduce writes the first, cats evaluate the second
    files += [p for p in (folder / "tasks.jsonl", folder / "results.jsonl") if p.exists()]
    read = (result for file in files for result in read_results(file))
    results = [result for result in read if isinstance(result, Perplexity | TaskScore)]
    if not any(result.variant == "dense" for result in results):
        raise DataError(f"{folder} holds no results of the dense model: cats reproduce writes them")
    return results


def tables(results: Sequence[Quality]) -> list[Table]:
    """One row per variant: bytes, perplexity of each text, mean accuracy and its loss; then tasks.

    Where models are quantised, it has megabytes of a token too, and what perplexities lose, which
    is exact to fractions of a percent. The first table has a title for both.
    """
    perplexity = {(r.variant, r.text): r for r in results if isinstance(r, Perplexity)}
    accuracy = {
        (r.variant, r.task): r for r in results if isinstance(r, TaskScore) and r.quantity == "acc"
    }
    variants = list(dict.fromkeys(r.variant for r in sorted(results, key=lambda r: r.order)))
    texts = list(dict.fromkeys(text for _, text in perplexity))
    tasks = [t for t in dict.fromkeys(task for _, task in accuracy) if t != MEAN]
    # a single task has no mean
    has_mean = any(task == MEAN for _, task in accuracy)
    quantised = any(r.quantised is not None for r in results)
    rows = []
    for variant in variants:
        records = [perplexity.get((variant, text)) for text in texts]
        share = next((r.mlp_share for r in records if r is not None), None)
        row = [variant, cell(share, ".1%")]
        if quantised:
            size = next((r.token_bytes / 1e6 for r in records if r is not None), None)
            row.append(cell(size, ",.1f"))
        for r in records:
            row.append("" if r is None else f"{r.value:.2f}")
            if quantised:
                row.append("" if r is None else _loss(r))
        if has_mean:
            mean = accuracy.get((variant, MEAN))
            row += ["", ""] if mean is None else [f"{mean.value:.2%}", _difference(mean)]
        rows.append(row)
    if quantised:
        # lines of a terminal begin after each comma: what is wider than 80 characters is cut off
        columns = ["variant", "MLP, read", "MB, per token"]
        columns += [name for text in texts for name in (f"perplexity, {_short(text)}", "change")]
        mean_name = f"{len(tasks)} tasks, mean"
    else:
        columns = ["variant", "MLP bytes read"]
        columns += [f"perplexity of {_short(text)}" for text in texts]
        mean_name = f"mean of {len(tasks)} tasks"
    columns += [mean_name, "difference"] if has_mean else []
    out = [Table(title=_title(results[0]), columns=columns, rows=rows)]
    if tasks:
        rows = []
        for task in tasks:
            dense = accuracy[variants[0], task]
            scores = [accuracy.get((variant, task)) for variant in variants]
            label = f"{task} ({dense.split}, {dense.samples:,})"
            rows.append([label, *map(_score, scores)])
        out.append(Table(columns=["task (split, questions)", *variants], rows=rows))
    return out


def _title(r: Quality) -> str:
    begin = ", every block begun with a beginning-of-sequence token" if r.bos else ""
    calibrated = ""
    if r.calibration_samples is not None:
        calibrated = (
            f"; calibrated on {r.calibration_samples} blocks of {r.calibration_length} tokens of "
            f"{r.calibration_text}, seed {r.calibration_seed}"
        )
    return (
        f"{r.model}, {r.dtype}, on {r.device}{calibrated}{begin}; differences to dense are paired, "
        "± one standard error"
    )


def _loss(r: Perplexity) -> str:
    """By how much a perplexity is above that of the dense model; empty for that model."""
    if r.variant == "dense" or r.loss_difference is None:
        return ""
    change = f"{math.expm1(r.loss_difference):+.2%}"
    return plus_minus(change, r.loss_difference_stderr, ".2f")


def _short(text: str) -> str:
    """A text's name without the suffixes of its file."""
    return re.sub(r"\.(txt|jsonl?|parquet)(\.gz)?", "", text)


def _score(result: TaskScore | None) -> str:
    if result is None:
        return ""
    difference = _difference(result)
    return f"{result.value:.1%}" + (f" ({difference})" if difference else "")


def _difference(result: TaskScore) -> str:
    """In percentage points; empty for the dense model."""
    if result.variant == "dense":
        return ""
    return plus_minus(points(result.difference), result.difference_stderr, ".2f")


def over(
    results: Iterable[Quality],
    name: str,
    *,
    label: str,
    x_label: str,
    x: Callable[[Quality], float | None],
    log: bool = False,
) -> str:
    """A measure of quality of every method, over sparsity or over bytes, as SVG.

    Args:
        results: One per variant.
        name: Name of the figure on its page.
        label: Label of the measure.
        x_label: Label of the x axis.
        x: The x of a result; None leaves it out. The dense model is a horizontal line.
        log: Whether the scale is logarithmic, for a measure without an upper bound.
    """
    figure, axis = plots.single()
    lines: defaultdict[str, list[tuple[float, float, float, float]]] = defaultdict(list)
    for r in results:
        position = x(r)
        if r.method == "dense":
            axis.axhline(r.value, color=plots.INK, linestyle="--", linewidth=1, label="dense")
        elif position is not None:
            lines[r.family].append((position, r.value, r.low, r.high))
    # a method has the same colour in every figure
    names = list(dict.fromkeys([*COMPARED[1:], *lines]))
    for method, line in lines.items():
        colour = plots.colour(names.index(method))
        plots.line(axis, sorted(line), label=method, colour=colour)
    plots.label(axis, x=x_label, y=label)
    if log:
        from matplotlib.ticker import LogFormatter

        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(LogFormatter())
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
    plots.legend(axis)
    return plots.svg(figure, name)


def tradeoff(tradeoff: Tradeoff, name: str) -> str:
    """Perplexity against measured speed: a line per method and loop, each from the dense model."""
    figure, axis = plots.single()
    methods = list(dict.fromkeys(m.quality.method for m in tradeoff.sparse))
    number = 0
    for loop in tradeoff.dense.times:
        for method in methods:
            line = [m for m in tradeoff.sparse if m.quality.method == method and loop in m.times]
            if not line:
                continue
            measured = [tradeoff.dense, *line]
            speeds = [m.speed(loop) for m in measured]
            below = [
                v - m.speed(loop, m.times[loop].high) for v, m in zip(speeds, measured, strict=True)
            ]
            above = [
                m.speed(loop, m.times[loop].low) - v for v, m in zip(speeds, measured, strict=True)
            ]
            axis.errorbar(
                speeds,
                [m.quality.value for m in measured],
                xerr=[below, above],
                label=f"{method}, {loop}" if len(tradeoff.dense.times) > 1 else method,
                color=plots.colour(number),
                marker="o",
                markersize=4,
                capsize=2,
            )
            number += 1
            for m, speed in zip(measured, speeds, strict=True):
                if m is not tradeoff.dense or method == methods[0]:
                    _annotate(axis, m.quality.variant, (speed, m.quality.value))
    x, y = "tokens per second (right is faster)", "perplexity (lower is better)"
    plots.label(axis, x=x, y=y)
    axis.margins(x=0.15, y=0.2)
    axis.set_xlim(left=0)
    # above the frame: inside, it would hide a point
    plots.legend(axis, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return plots.svg(figure, name)


def _annotate(axis: Axes, text: str, point: tuple[float, float]) -> None:
    axis.annotate(
        text,
        point,
        xytext=(0, 6),
        textcoords="offset points",
        fontsize=8,
        ha="center",
        va="bottom",
    )
