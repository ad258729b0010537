"""Table of ``cats bench sessions``, from its results alone."""

from __future__ import annotations

from collections.abc import Iterable

from cats.errors import DataError
from cats.report.tables import Table, cell
from cats.results import (
    FirstTokenWait,
    Result,
    SessionLatency,
    SessionsRate,
    SessionsResult,
    SessionsWait,
    TokenGap,
)

# What the columns mean; it stands below the tables.
LEGEND = """\
tok/s: of all sessions, over the time in which at least one was open. of full: the same over that
of these sessions opened at once. first: from the call to the first token. gap: between two tokens
of a session. whole: from the call to the last token. Columns are the median, the percentiles 90
and 99, and the longest one."""

_WAITS: tuple[tuple[str, type[SessionsWait], str], ...] = (
    ("first, ms", FirstTokenWait, ".0f"),
    ("gap, ms", TokenGap, ".1f"),
    ("whole, s", SessionLatency, ".1f"),
)


def tables(results: Iterable[Result]) -> list[Table]:
    """One table per set of sessions, with one row for each kind of wait of each target.

    Of each target, the last run counts.

    Raises:
        DataError: If there are no such results.
    """
    panels: dict[str, dict[float, dict[type, SessionsResult]]] = {}
    for r in results:
        if isinstance(r, SessionsResult):
            panels.setdefault(_title(r), {}).setdefault(r.sparsity, {})[type(r)] = r
    if not panels:
        raise DataError("no result of `cats bench sessions` in the file")
    return [
        Table(
            title=title,
            columns=("target", "tok/s", "of full", "wait", "median", "90 %", "99 %", "longest"),
            rows=[row for target, found in panel.items() for row in _rows(target, found)],
        )
        for title, panel in panels.items()
    ]


def _rows(target: float, found: dict[type, SessionsResult]) -> Iterable[list[str]]:
    rate = found.get(SessionsRate)
    names = [f"{target:.0%}", "", ""]
    if isinstance(rate, SessionsRate):
        names = [f"{target:.0%}", f"{rate.value:.1f}", f"{rate.share:.0%}"]
    for name, kind, form in _WAITS:
        wait = found.get(kind)
        if isinstance(wait, SessionsWait):
            values = (wait.value, wait.p90, wait.p99, wait.longest)
            yield [*names, name.replace(",", " in"), *(cell(value, form) for value in values)]
            names = ["", "", ""]


def _title(r: SessionsResult) -> str:
    return (
        f"{r.model}, {r.dtype}, {r.sessions} sessions within {r.seconds:g} s, {r.rows} rows, "
        f"prompts of {r.shortest_prompt} to {r.longest_prompt:,} and answers of "
        f"{r.fewest_tokens} to {r.most_tokens:,} tokens, {r.engine}, on {r.device}"
    )
