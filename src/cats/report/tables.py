"""One table of text, shown in a terminal, in Markdown or in HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of cells, which are text already.

    Attributes:
        columns: Their names; a unit stands after a comma. Without any name there is no header.
        rows: One cell for each column.
        names: How many of the first columns hold names, aligned left. The others hold numbers,
            aligned right.
        title: Text above the table.
        caption: Text below the table.
        total: A last row that stands apart from the others, such as their mean.
        wrap: Whether names may be broken into lines; numbers never are.
        bars: Whether the last column holds bars, which begin at the left.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1
    title: str = ""
    caption: str = ""
    total: Sequence[str] = ()
    wrap: bool = False
    bars: bool = False

    @property
    def _rows(self) -> list[Sequence[str]]:
        return [*self.rows, self.total] if self.total else list(self.rows)

    def markdown(self) -> str:
        """The lines of a Markdown table, below its title and an empty line."""
        rule = "| " + " | ".join(["---"] * self.names)
        rule += " |" + " ---: |" * (len(self.columns) - self.names)
        lines = [f"{self.title}\n"] if self.title else []
        lines += [_markdown_row(self.columns), rule, *map(_markdown_row, self._rows)]
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        """A ``<table>`` element, without its title and caption."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self._rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def rich(self) -> Group:
        """The table for a terminal.

        Units stand below the names, and no lines between columns: most tables fit 80 characters.
        """
        from rich import box
        from rich.console import Group
        from rich.markup import escape as plain
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(show_header=any(self.columns), box=box.SIMPLE_HEAD, padding=0)
        for number, name in enumerate(self.columns):
            is_name = number < self.names
            is_bar = self.bars and number == len(self.columns) - 1
            table.add_column(
                plain(name.replace(", ", "\n")),
                justify="left" if is_name or is_bar else "right",
                no_wrap=not (is_name and self.wrap),
                overflow="fold",
            )
        for row in self.rows:
            table.add_row(*map(plain, row))
        if self.total:
            table.add_section()
            table.add_row(*map(plain, self.total))
        # beside the table, since rich breaks the lines of its own titles at the table's width
        title = [Text(self.title, style="italic")] if self.title else []
        caption = [Text(self.caption, style="dim italic")] if self.caption else []
        return Group(*title, table, *caption)


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def cell(value: float | None, form: str) -> str:
    """A number in a format such as ``".1%"``; empty for None."""
    return "" if value is None else format(value, form)


def points(share: float | None) -> str:
    """A difference of shares in percentage points; empty for None."""
    return "" if share is None else f"{100 * share:+.2f}"


def plus_minus(value: str, error: float | None, form: str) -> str:
    """A number and its standard error in percent; without the error if that is None."""
    return value if error is None else f"{value} ± {100 * error:{form}}"
