"""Tables in documents that are made from results files, so that no number is typed by hand.

A document holds ``<!-- mlp: PATH -->`` and ``<!-- /mlp -->``, each on a line of its own; what lies
between is the table of that file. ``decode`` in the place of ``mlp`` quotes times of whole tokens,
``finetune`` the histories in a folder, ``quality`` the folder of ``cats reproduce``.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from cats.benchmarks import decode_report, mlp_report
from cats.benchmarks.mlp import DENSE
from cats.benchmarks.quality_report import head, quality_table, read_quality, row
from cats.errors import DataError
from cats.history import History, names_of, recovered
from cats.results import read_results

# What each kind of quote makes of the path behind it.
_TABLES: dict[str, Callable[[Path], str]] = {
    "mlp": lambda path: mlp_table(mlp_report.panels(read_results(path))),
    "decode": lambda path: decode_table(decode_report.panels(read_results(path))),
    "finetune": lambda path: finetune_table(
        {file.stem: History.load(file) for file in sorted(path.glob("*.jsonl"))}
    ),
    "quality": lambda path: quality_table(read_quality(path)),
}
_QUOTE = re.compile(
    rf"(?<=^<!-- )({'|'.join(_TABLES)})(: )(\S+)( -->\n)(.*?)(?=^<!-- /\1 -->$)", re.S | re.M
)


def requote(document: Path) -> str:
    """The text of a document with each quoted table made anew; paths start at its folder.

    Raises:
        StorageError: If a results file cannot be read.
        DataError: If the document quotes nothing.
    """

    def quoted(match: re.Match[str]) -> str:
        return "".join(match.group(1, 2, 3, 4)) + _TABLES[match[1]](document.parent / match[3])

    text, quotes = _QUOTE.subn(quoted, document.read_text(encoding="utf-8"))
    if not quotes:
        raise DataError(
            f"{document}: has no line <!-- KIND: PATH -->, where KIND is one of "
            f"{', '.join(_TABLES)}"
        )
    return text


def mlp_table(found: list[mlp_report.Panel]) -> str:
    """Times of calls chained back to back, in microseconds, one row a shape and variant."""
    found = [panel for panel in found if panel.neighbour == "none"]
    sparsities = sorted({sparsity for panel in found for _, sparsity in panel.times})
    columns = [f"{sparsity:.0%}" for sparsity in sparsities]
    lines = [
        f"{found[0].device}, {found[0].dtype}: microseconds a call "
        "(fraction of the memory limit, speed-up over the best dense of the same run)",
        "",
        "| shape | | " + " | ".join(columns) + " |",
        "| --- | --- |" + " ---: |" * len(columns),
    ]
    for panel in found:
        tokens = f", {panel.batch} tokens" if panel.batch > 1 else ""
        shape = f"{panel.hidden_size}x{panel.intermediate_size}{tokens}{panel.run_words}"
        dense = ", ".join(f"{name} {result.value:.1f}" for name, result in panel.dense.items())
        if panel.best_dense is None:
            lines.append(f"| {shape} | no dense in this run |" + " |" * len(columns))
        else:
            lines.append(
                f"| {shape} | best dense of: {dense} | {panel.best_dense:.1f} |"
                + " |" * (len(columns) - 1)
            )
        for name in panel.sparse_variants:
            cells = [_cell(panel, name, sparsity) for sparsity in sparsities]
            lines.append(f"| | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(panel: mlp_report.Panel, name: str, sparsity: float) -> str:
    assert name not in DENSE
    result = panel.times.get((name, sparsity))
    if result is None:
        return ""
    limit = float(result.settings["limit_us"] or 0)
    beside = "" if panel.best_dense is None else f", {panel.best_dense / result.value:.2f}x"
    return f"{result.value:.1f} ({limit / result.value:.2f}{beside})"


def decode_table(found: list[decode_report.Panel]) -> str:
    """Tokens a second through the loop, one row a model and variant.

    A row names a batch or prompt that is not that of the heading.
    """
    batch, prompt = found[0].batch, found[0].prompt_length
    sparsities = sorted({sparsity for panel in found for _, sparsity in panel.times()})
    dtypes = ", ".join(dict.fromkeys(panel.dtype for panel in found))
    lines = [
        f"{found[0].device}, {dtypes}, batch {batch}, prompt {prompt}: tokens a second "
        "(fraction of the memory limit, speed-up over the fastest dense loop of the same run)",
        "",
        "| model | | " + " | ".join(f"{sparsity:.0%}" for sparsity in sparsities) + " |",
        "| --- | --- |" + " ---: |" * len(sparsities),
    ]
    for panel in found:
        times = panel.times()
        model = panel.model
        if dtypes != panel.dtype:
            model += f", {panel.dtype}"
        if panel.batch != batch:
            model += f", batch {panel.batch}"
        if panel.prompt_length != prompt:
            model += f", prompt {panel.prompt_length:,}"
        for variant in dict.fromkeys(variant for variant, _ in times):
            cells = []
            for sparsity in sparsities:
                step = times.get((variant, sparsity))
                if step is None:
                    cells.append("")
                    continue
                share = float(step.settings["limit_ms"] or 0) / step.value
                faster = decode_report.speedup(step)
                beside = "" if faster is None else f", {faster:.2f}x"
                cells.append(f"{panel.batch * 1e3 / step.value:.1f} ({share:.2f}{beside})")
            lines.append(f"| {model} | {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def finetune_table(found: Mapping[str, History]) -> str:
    """Log-perplexity before and after fine-tuning, one row a run.

    Raises:
        DataError: If there is no run that came to its end.
    """
    runs = {name: history for name, history in found.items() if history.complete}
    if not runs:
        raise DataError("there is no complete history of a fine-tuning to quote")
    texts, tasks = names_of(runs.values())
    first = next(iter(runs.values()))
    columns = ["steps", "tokens", *texts, *(f"{task}, right" for task in tasks), "dropped"]
    lines = [
        f"{first.environment['device']}, {first.settings['model']}, {first.settings['dtype']}: "
        "log-perplexity before and after (share of the loss against dense that is recovered)",
        "",
        *head("run", columns),
    ]
    for name, history in runs.items():
        start, end = history.points[0], history.points[-1]
        cells = [str(end.step), f"{end.tokens:,}"]
        for text in texts:
            share = recovered(history, runs.values(), text)
            cell = f"{start.losses[text]:.4f} > {end.losses[text]:.4f}"
            cells.append(cell + ("" if share is None else f" ({share:.0%})"))
        cells += [f"{end.accuracy[task]:.1%}" if task in end.accuracy else "" for task in tasks]
        cells.append("" if end.sparsity is None else f"{end.sparsity:.1%}")
        lines.append(row(name, cells))
    return "\n".join(lines) + "\n"
