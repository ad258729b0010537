"""The page: sections of tables and figures, without script, fonts or network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path

from cats.report import activations, paper, quality
from cats.report.material import Material
from cats.report.page_tables import (
    calibration,
    difference,
    has_lines,
    perplexity_rows,
    score,
    task_table,
    time_row,
    times,
)
from cats.report.quality import Quality
from cats.report.style import STYLE
from cats.report.tables import Table
from cats.results import MEAN, DemoTime, Perplexity, TaskScore
from cats.storage import replacing
from cats.version import __version__


def write_page(material: Material, path: Path, *, title: str = "CATS") -> dict[str, str]:
    """Write the report.

    Args:
        material: Results and profiles.
        path: File of the page.
        title: Title of the page.

    Returns:
        Name of each figure to its SVG.

    Raises:
        DataError: If matplotlib is not installed.
        StorageError: If the page cannot be written.
    """
    page = _Page()
    page.tradeoffs(material)
    page.quality(material)
    page.profiles(material)
    page.times(material)
    page.paper()
    page.settings(material)
    html = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n"
        f'<p class="note">Made with cats {__version__} from {_count(len(material.files), "file")} '
        "of measurements. What stands after ± is one standard error. A time is the median of "
        "several runs.</p>\n" + "\n".join(page.parts) + "\n</body>\n</html>\n"
    )
    with replacing(path) as temporary:
        temporary.write_text(html, "utf-8")
    return page.figures


class _Page:
    """The parts of the body, one after another."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.figures: dict[str, str] = {}

    def tradeoffs(self, material: Material) -> None:
        tradeoffs = material.tradeoffs()
        if tradeoffs:
            self._heading("What was gained for what")
        for tradeoff in tradeoffs:
            self._text(tradeoff.sentence())
            caption = "Perplexity against measured speed; the bars are quartiles of the runs"
            self._draw({caption: partial(quality.tradeoff, tradeoff)})

    def quality(self, material: Material) -> None:
        perplexities, tasks = material.perplexities(), material.tasks()
        traffic = {(r.model, r.variant): r for group in perplexities.values() for r in group}
        if perplexities:
            self._heading("Perplexity")
        for name, group in perplexities.items():
            self._heading(name, level=3)
            columns = ["variant", "perplexity", "change", "MLP read", "MB per token"]
            self._table(Table(columns=columns, rows=perplexity_rows(group)))
            self._note(calibration(group))
            self._quality_figures(group, "perplexity", traffic)
        if tasks:
            self._heading("Zero-shot tasks")
        for name, scores in tasks.items():
            self._heading(name, level=3)
            for metric in dict.fromkeys(r.quantity for r in scores):
                of_metric = [r for r in scores if r.quantity == metric]
                self._table(task_table(of_metric, metric, score))
                self._table(task_table(of_metric, f"{metric}, less dense", difference))
            self._note(
                "In percent. The error of a difference is that of the paired differences, question "
                "by question. " + calibration(scores)
            )
            means = [r for r in scores if r.task == MEAN]
            if means:
                self._quality_figures(means, "mean accuracy", traffic)

    def profiles(self, material: Material) -> None:
        # imported here: the page of other results needs no torch
        from cats.config import label_of

        if material.profiles:
            self._heading("Activations")
        for profile in material.profiles:
            sparse = profile.cats
            label = (
                label_of(
                    sparse["method"], sparse.get("target_sparsity"), sparse.get("target_bytes")
                )
                if sparse
                else "dense"
            )
            tokens = f"{profile.tokens:,} tokens of {profile.text}"
            self._heading(f"{profile.model}, {label}, {tokens}", level=3)
            magnitudes = "Magnitudes of activations; dotted: the threshold of that layer"
            drawings = {
                magnitudes: activations.histograms,
                "Share of zeros, layer by layer": activations.layers,
                "Share of zeros by position": activations.positions,
            }
            self._draw({caption: partial(draw, profile) for caption, draw in drawings.items()})
            shares = ", ".join(f"{q}: {value:.1%}" for q, value in profile.by_token.items())
            self._note(f"Share of zeros of a token, quantiles over the tokens: {shares}.")

    def times(self, material: Material) -> None:
        groups = material.times()
        if groups:
            self._heading("Speed")
        for name, group in groups.items():
            self._heading(name, level=3)
            # a demo's speeds stand in its figure of what was gained
            if not isinstance(group[0], DemoTime) and has_lines(group):
                self._draw({"Speed against sparsity": partial(times, group)})
            header = ["variant", "sparsity", group[0].unit, "quartiles", "limit", "of limit"]
            # empty columns are left out
            columns = 6 if any(r.limit is not None for r in group) else 4
            rows = [time_row(r)[:columns] for r in group]
            self._table(Table(columns=header[:columns], rows=rows))

    def paper(self) -> None:
        self._heading("The paper's numbers")
        variants = list(dict.fromkeys(v for row in paper.MEAN_ACCURACY.values() for v in row))
        rows = [
            [model, *(f"{100 * row[v]:.2f}" for v in variants)]
            for model, row in paper.MEAN_ACCURACY.items()
        ]
        self._table(Table(columns=["mean accuracy of the eight tasks", *variants], rows=rows))
        speeds = [[name, speed] for name, speed in paper.SPEED.items()]
        self._table(Table(columns=["speed at 50 %, float32", ""], rows=speeds))
        self._note("arXiv:2404.08763; accuracy without fine-tuning.")

    def settings(self, material: Material) -> None:
        self._heading("Settings behind the numbers")
        self._note("Files: " + ", ".join(material.files) + ".")
        by_benchmark: dict[str, dict[str, None]] = {}
        for r in material.results:
            environment = {name: v for name, v in r.environment.items() if name != "time"}
            block = json.dumps(environment, indent=1)
            by_benchmark.setdefault(r.benchmark, {})[block] = None
        for benchmark, environments in by_benchmark.items():
            for block in environments:
                self._details(f"{benchmark}: where it was measured", block)
        for r in material.results:
            if isinstance(r, Perplexity) or (isinstance(r, TaskScore) and r.task == MEAN):
                data = r.text if isinstance(r, Perplexity) else r.task
                label = f"{r.variant}, {r.quantity}, {data}"
                self._details(label, json.dumps(r.settings, indent=1))

    def _quality_figures(
        self,
        group: Sequence[Quality],
        label: str,
        traffic: Mapping[tuple[str, str], Perplexity],
    ) -> None:
        def sparsity(r: Quality) -> float | None:
            if r.target_sparsity is not None:
                return r.target_sparsity
            # ReLU has no target: its realised sparsity
            measured = traffic.get((r.model, r.variant))
            return None if measured is None else measured.realized_sparsity

        def megabytes(r: Quality) -> float | None:
            measured = traffic.get((r.model, r.variant))
            return None if measured is None else measured.token_bytes / 1e6

        draw = partial(quality.over, group, label=label, log=label == "perplexity")
        sparse = [r for r in group if r.method != "dense"]
        drawings: dict[str, Callable[[str], str]] = {}
        # one point says no more than the table
        if sum(sparsity(r) is not None for r in sparse) > 1:
            note = "at each sparsity; two methods may count the same sparsity differently"
            drawings[_capital(f"{label} {note}")] = partial(draw, x=sparsity, x_label="sparsity")
        if sum(megabytes(r) is not None for r in sparse) > 1:
            note = "against the weights that one token reads: compare methods here"
            x_label = "MB read per token"
            drawings[_capital(f"{label} {note}")] = partial(draw, x=megabytes, x_label=x_label)
        self._draw(drawings)

    def _draw(self, drawings: Mapping[str, Callable[[str], str]]) -> None:
        """Figures side by side if there is room.

        Args:
            drawings: Caption of each figure to what draws it: it takes the figure's name and gives
                its SVG.
        """
        if not drawings:
            return
        html = []
        for caption, draw in drawings.items():
            name = f"figure{len(self.figures) + 1}"
            self.figures[name] = draw(name)
            html.append(
                f"<figure>{self.figures[name]}<figcaption>{escape(caption)}</figcaption></figure>"
            )
        self.parts.append(f'<div class="figures">{"".join(html)}</div>')

    def _heading(self, text: str, *, level: int = 2) -> None:
        self.parts.append(f"<h{level}>{escape(text)}</h{level}>")

    def _text(self, text: str) -> None:
        self.parts.append(f"<p>{escape(text)}</p>")

    def _note(self, text: str) -> None:
        self.parts.append(f'<p class="note">{escape(text)}</p>')

    def _details(self, summary: str, text: str) -> None:
        self.parts.append(
            f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
        )

    def _table(self, table: Table) -> None:
        self.parts.append(f'<div class="wide">{table.html()}</div>')


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
