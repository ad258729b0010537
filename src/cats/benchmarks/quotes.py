"""Tables in documents that are made from results files, so that no number is typed by hand.

A document holds ``<!-- mlp: PATH -->`` and ``<!-- /mlp -->``, each on a line of its own; what lies
between is the table of that file.
"""

import re
from pathlib import Path

from cats.benchmarks.mlp import DENSE
from cats.benchmarks.mlp_report import Panel, panels
from cats.errors import DataError
from cats.results import read_results

_QUOTE = re.compile(r"(?<=^<!-- mlp: )(\S+)( -->\n)(.*?)(?=^<!-- /mlp -->$)", re.S | re.M)


def requote(document: Path) -> str:
    """The text of a document with each quoted table made anew; paths start at its folder.

    Raises:
        StorageError: If a results file cannot be read.
        DataError: If the document quotes nothing.
    """
    text, quotes = _QUOTE.subn(
        lambda m: m[1] + m[2] + markdown(panels(read_results(document.parent / m[1]))),
        document.read_text(encoding="utf-8"),
    )
    if not quotes:
        raise DataError(f"{document}: has no line <!-- mlp: PATH -->")
    return text


def markdown(found: list[Panel]) -> str:
    """Times of calls chained back to back, in microseconds, one row a shape and variant."""
    found = [panel for panel in found if panel.neighbour == "none"]
    sparsities = sorted({sparsity for panel in found for _, sparsity in panel.times})
    columns = [f"{sparsity:.0%}" for sparsity in sparsities]
    lines = [
        f"{found[0].device}, {found[0].dtype}: microseconds a call "
        "(fraction of the memory limit, speed-up over the best dense)",
        "",
        "| shape | | " + " | ".join(columns) + " |",
        "| --- | --- |" + " ---: |" * len(columns),
    ]
    for panel in found:
        tokens = f", {panel.batch} tokens" if panel.batch > 1 else ""
        shape = f"{panel.hidden_size}x{panel.intermediate_size}{tokens}"
        dense = ", ".join(f"{name} {result.value:.1f}" for name, result in panel.dense.items())
        lines.append(
            f"| {shape} | best dense of: {dense} | {panel.best_dense:.1f} |"
            + " |" * (len(columns) - 1)
        )
        for name in panel.sparse_variants:
            cells = [_cell(panel, name, sparsity) for sparsity in sparsities]
            lines.append(f"| | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(panel: Panel, name: str, sparsity: float) -> str:
    assert name not in DENSE
    result = panel.times.get((name, sparsity))
    if result is None:
        return ""
    limit = float(result.settings["limit_us"] or 0)
    share, speedup = limit / result.value, panel.best_dense / result.value
    return f"{result.value:.1f} ({share:.2f}, {speedup:.2f}x)"
