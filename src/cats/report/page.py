"""The page: sections of tables and figures, without script, fonts or network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cats.config import label_of
from cats.report import figures, paper
from cats.report.material import Material, limit
from cats.results import MEAN, Result
from cats.storage import replacing
from cats.version import __version__

_STYLE = """
:root { color-scheme: light dark; --paper: light-dark(#fff, #16181b);
  --shadow: light-dark(#0005, #fff5); }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif;
  color: light-dark(#1c1c1c, #e4e4e4); background: var(--paper); }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
h3 { font-size: 1rem; margin-bottom: .3rem; overflow-wrap: anywhere; }
/* a shadow at an edge shows that the table goes on there */
.wide { overflow-x: auto; margin-bottom: 1rem; background:
  linear-gradient(to right, var(--paper) 40%, transparent) 0 0 / 3rem 100% local no-repeat,
  linear-gradient(to left, var(--paper) 40%, transparent) 100% 0 / 3rem 100% local no-repeat,
  linear-gradient(to right, var(--shadow), transparent) 0 0 / 1rem 100% scroll no-repeat,
  linear-gradient(to left, var(--shadow), transparent) 100% 0 / 1rem 100% scroll no-repeat; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid light-dark(#ddd, #383c42); }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
@media (max-width: 40rem) { th, td { padding-left: .3rem; padding-right: .3rem; } }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 1 1 20rem; min-width: 0; max-width: 34rem; }
figure svg { width: 100%; height: auto; }
figcaption, .note, details { font-size: .875rem; color: light-dark(#555, #a4a8ae); }
pre { overflow-x: auto; }
"""


def write_page(material: Material, path: Path, *, title: str = "CATS") -> dict[str, str]:
    """Write the report.

    Args:
        material: What it is made of.
        path: The page.
        title: Its title.

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
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
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
        found = material.tradeoffs()
        if found:
            self._heading("What was gained for what")
        for each in found:
            self._text(each.sentence())
            self._draw({
                "Perplexity against measured speed; the bars are quartiles of the runs":
                    lambda name, e=each: figures.tradeoff(e, name)
            })  # fmt: skip

    def quality(self, material: Material) -> None:
        perplexities, tasks = material.perplexities(), material.tasks()
        traffic = {
            (r.settings["model"], r.settings["variant"]): r.settings
            for group in perplexities.values()
            for r in group
        }
        if perplexities:
            self._heading("Perplexity")
        for name, group in perplexities.items():
            self._heading(name, level=3)
            self._table(
                ["variant", "perplexity", "change", "MLP weights read", "MB read per token"],
                _perplexity_rows(group),
            )
            self._note(_calibration(group))
            self._quality_figures(group, "perplexity", traffic)
        if tasks:
            self._heading("Zero-shot tasks")
        for name, group in tasks.items():
            self._heading(name, level=3)
            for metric in dict.fromkeys(r.quantity for r in group):
                of_metric = [r for r in group if r.quantity == metric]
                self._table(*_task_table(of_metric, metric, _score))
                self._table(*_task_table(of_metric, f"{metric}, less dense", _difference))
            self._note(
                "In percent. The error of a difference is that of the paired differences, question "
                "by question. " + _calibration(group)
            )
            means = [r for r in group if r.settings["task"] == MEAN]
            if means:
                self._quality_figures(means, "mean accuracy", traffic)

    def profiles(self, material: Material) -> None:
        if material.profiles:
            self._heading("Activations")
        for profile in material.profiles:
            sparse = profile.get("cats")
            label = label_of(sparse["method"], sparse.get("target_sparsity")) if sparse else "dense"
            self._heading(
                f"{profile['model']}, {label}, {profile['tokens']:,} tokens of {profile['text']}",
                level=3,
            )
            self._draw({
                "Magnitudes of activations; dotted: the threshold of that layer":
                    lambda name, p=profile: figures.histograms(p, name),
                "Share of zeros, layer by layer": lambda name, p=profile: figures.layers(p, name),
                "Share of zeros by position": lambda name, p=profile: figures.positions(p, name),
            })  # fmt: skip
            shares = ", ".join(f"{q}: {value:.1%}" for q, value in profile["by_token"].items())
            self._note(f"Share of zeros of a token, quantiles over the tokens: {shares}.")

    def times(self, material: Material) -> None:
        groups = material.times()
        if groups:
            self._heading("Speed")
        for name, group in groups.items():
            self._heading(name, level=3)
            # a demo's speeds stand in its figure of what was gained
            if group[0].benchmark != "demo" and figures.has_lines(group):
                self._draw(
                    {"Time against sparsity": lambda figure, g=group: figures.times(g, figure)}
                )
            header = ["variant", "sparsity", group[0].unit, "quartiles", "limit", "of limit"]
            # a column that nothing stands in is left out
            columns = 6 if any(limit(r) is not None for r in group) else 4
            self._table(header[:columns], [_time_row(r)[:columns] for r in group])

    def paper(self) -> None:
        self._heading("The paper's numbers")
        variants = list(dict.fromkeys(v for row in paper.MEAN_ACCURACY.values() for v in row))
        self._table(
            ["mean accuracy of the eight tasks", *variants],
            [
                [model, *(f"{100 * row[v]:.2f}" for v in variants)]
                for model, row in paper.MEAN_ACCURACY.items()
            ],
        )
        self._table(["speed at 50 %, float32", ""], [[n, v] for n, v in paper.SPEED.items()])
        self._note("arXiv:2404.08763; accuracy without fine-tuning.")

    def settings(self, material: Material) -> None:
        self._heading("Settings behind the numbers")
        self._note("Files: " + ", ".join(material.files) + ".")
        by_benchmark: dict[str, dict[str, None]] = {}
        for r in material.results:
            environment = {n: v for n, v in r.environment.items() if n != "time"}
            block = json.dumps(environment, indent=1)
            by_benchmark.setdefault(r.benchmark, {})[block] = None
        for benchmark, environments in by_benchmark.items():
            for block in environments:
                self._details(f"{benchmark}: where it was measured", block)
        for r in material.results:
            about = r.settings.get("text") or r.settings.get("task")
            if r.benchmark == "perplexity" or about == MEAN:
                label = f"{r.settings['variant']}, {r.quantity}, {about}"
                self._details(label, json.dumps(r.settings, indent=1))

    def _quality_figures(self, group: Sequence[Result], label: str, traffic: Any) -> None:
        def read(r: Result, key: str) -> float | None:
            settings = traffic.get((r.settings["model"], r.settings["variant"]), {})
            value = settings.get(key)
            return None if value is None else float(value)

        def sparsity(r: Result) -> float | None:
            # ReLU has no target: what it drops
            target = r.settings["target_sparsity"]
            return float(target) if target is not None else read(r, "realized_sparsity")

        def megabytes(r: Result) -> float | None:
            value = read(r, "token_bytes")
            return None if value is None else value / 1e6

        sparse = [r for r in group if r.settings["method"] != "dense"]
        drawings = {}
        # one point says no more than the table
        if sum(sparsity(r) is not None for r in sparse) > 1:
            caption = (
                f"{label} at each sparsity; two methods may count the same sparsity differently"
            )
            drawings[_capital(caption)] = (sparsity, "sparsity")
        if sum(megabytes(r) is not None for r in sparse) > 1:
            caption = f"{label} against the weights that one token reads: compare methods here"
            drawings[_capital(caption)] = (megabytes, "MB read per token")
        self._draw({
            caption: lambda name, x=x, x_label=x_label: figures.quality(
                group, name, label=label, x_label=x_label, x=x, log=label == "perplexity"
            )
            for caption, (x, x_label) in drawings.items()
        })  # fmt: skip

    def _draw(self, drawings: dict[str, Any]) -> None:
        """Figures side by side where there is room; each caption to what draws it."""
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

    def _table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
        )
        self.parts.append(
            f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _perplexity_rows(group: Sequence[Result]) -> Iterable[Sequence[str]]:
    dense = next((r.value for r in group if r.settings["method"] == "dense"), None)
    for r in group:
        yield [
            str(r.settings["variant"]),
            f"{r.value:.3f}",
            "" if dense is None or r.value == dense else f"{r.value / dense - 1:+.1%}",
            f"{float(r.settings['mlp_share'] or 0):.1%}",
            f"{float(r.settings['token_bytes'] or 0) / 1e6:,.1f}",
        ]


def _calibration(group: Sequence[Result]) -> str:
    """Where the group was measured, and on what its thresholds were calibrated."""
    where = f"On {group[0].environment['device']}. "
    s = next((r.settings for r in group if r.settings["method"] != "dense"), None)
    if s is None:
        return where
    if "calibration_samples" not in s:
        return f"{where}Calibrated on {s['calibration_tokens']:,} tokens."
    return (
        f"{where}Calibrated on {s['calibration_samples']} blocks of {s['calibration_length']} "
        f"tokens of {s['calibration_text']}, seed {s['calibration_seed']}."
    )


def _task_table(
    group: Sequence[Result], title: str, cell: Callable[[Result], str]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row a variant, one column a task, the mean first."""
    tasks: dict[str, str] = {}
    rows: dict[str, dict[str, str]] = {}
    # the mean, which stands last in the results, stays in sight on a narrow page
    for r in sorted(group, key=lambda r: r.settings["task"] != MEAN):
        task, split = str(r.settings["task"]), r.settings["split"]
        tasks[task] = f"{task} ({split}, {r.samples:,})" if split else task
        rows.setdefault(str(r.settings["variant"]), {})[task] = cell(r)
    return [title, *tasks.values()], [
        [variant, *(cells.get(task, "") for task in tasks)] for variant, cells in rows.items()
    ]


def _score(r: Result) -> str:
    return _plus_minus(f"{100 * r.value:.1f}", r.settings["stderr"])


def _difference(r: Result) -> str:
    if r.settings["method"] == "dense":
        return ""
    difference = f"{100 * float(r.settings['difference'] or 0):+.1f}"
    return _plus_minus(difference, r.settings["difference_stderr"])


def _plus_minus(value: str, error: Any) -> str:
    return value if error is None else f"{value} ± {100 * float(error):.1f}"


def _time_row(r: Result) -> list[str]:
    bound = limit(r)
    return [
        str(r.settings["variant"]),
        f"{float(r.settings['sparsity'] or 0):.0%}",
        _four_digits(r.value),
        f"{_four_digits(r.low)} to {_four_digits(r.high)}",
        "" if bound is None else _four_digits(bound),
        "" if bound is None else f"{bound / r.value:.2f}",
    ]


def _four_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
