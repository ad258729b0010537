"""Table of ``cats bench serve``, from its results alone."""

from __future__ import annotations

from collections.abc import Sequence

from cats.report.tables import Table
from cats.results import ServedFirstToken, ServedRate, ServingOverhead, ServingResult


def table(results: Sequence[ServingResult]) -> Table:
    """One row per number of streams: rates, overhead, and times to the first token."""
    first = results[0]
    rows = []
    for streams in dict.fromkeys(r.streams for r in results):
        own = [r for r in results if r.streams == streams]
        rates = {r.by: r.value for r in own if isinstance(r, ServedRate)}
        overhead = next(r for r in own if isinstance(r, ServingOverhead))
        waits = next(r for r in own if isinstance(r, ServedFirstToken))
        rows.append(
            [
                str(streams),
                f"{rates['engine']:.1f}",
                f"{rates['server']:.1f}",
                f"{overhead.value:.1f} ({overhead.low:.1f} to {overhead.high:.1f})",
                f"{waits.value:.0f} / {waits.p95:.0f} / {waits.p99:.0f}",
            ]
        )
    return Table(
        title=f"{first.model}, target {first.target:g}, {first.dtype}, prompts of "
        f"{first.prompt_length} tokens, {first.new_tokens} new ones",
        columns=(
            "streams",
            "engine, tokens/s",
            "server, tokens/s",
            "overhead, % (quartiles)",
            "first token, ms (median / 95 % / 99 %)",
        ),
        rows=rows,
    )
