"""Whose prompt runs next, and what it need not run since a line of the cache holds it."""

from __future__ import annotations

from cats.decode.rows.engine import RowEngine
from cats.decode.rows.lines import Ids, Lines, common_length
from cats.decode.rows.row import Row

# Copying slots costs some launches for each layer, and so does running a few tokens.
_WORTH_COPYING = 16


def take_turn(rows: list[Row]) -> Row | None:
    """The row whose turn it is; it then stands behind the others. None where all wait.

    A prompt waits for an older one that begins in the same way and has not run so far yet.
    """
    for row in rows:
        if not _waits(row, rows):
            rows.remove(row)
            rows.append(row)
            return row
    return None


def borrow(row: Row, lines: Lines, engine: RowEngine) -> None:
    """Copy what another line holds of a row's prompt."""
    line, _ = lines.longest(row.prompt)
    shared = _shared(line.tokens, row)
    if not row.line.stale and shared >= row.done + _WORTH_COPYING:
        row.line.writes(shared)
        engine.copy(line.index, row.line.index, row.done, shared)
        row.progress.reused += shared - row.done
        row.reached(shared)


def _waits(row: Row, rows: list[Row]) -> bool:
    return any(
        older.number < row.number
        and older.line.stale == row.line.stale
        and _shared(older.prompt, row) >= max(row.done + _WORTH_COPYING, older.done + 1)
        for older in rows
    )


def _shared(tokens: Ids, row: Row) -> int:
    """How many tokens a row's prompt shares with others, its last one left out."""
    return min(common_length(tokens, row.prompt), len(row.prompt) - 1)
