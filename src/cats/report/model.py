"""Table of ``cats bench model``, from its results alone."""

from __future__ import annotations

from collections.abc import Sequence

from cats.report.tables import Table
from cats.results import GenerateRate, PrefillTime


def table(results: Sequence[PrefillTime | GenerateRate]) -> Table:
    """One row per variant and cache: milliseconds of the prompt, tokens per second after it."""
    first = results[0]
    rows = []
    for r in results:
        cache = r.cache if isinstance(r, GenerateRate) else ""
        quartiles = f"{r.low:.2f}-{r.high:.2f}"
        rows.append([r.quantity, cache, r.variant, f"{r.value:.2f}", quartiles, r.unit])
    return Table(
        title=f"{first.shape}, {first.layers} layers, {first.dtype}",
        columns=("quantity", "cache", "variant", "median", "quartiles", "unit"),
        rows=rows,
        names=3,
    )
