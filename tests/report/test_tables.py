import io

from rich.console import Console

from cats.cli.tables import layer_table
from cats.report.tables import Table, cell, plus_minus, points

TABLE = Table(
    title="<a> [b]title[/b]",
    columns=["name", "time, ms", "[bold]"],
    rows=[["a & b", "1.0", "2"]],
    total=["mean", "1.0", ""],
    caption="below",
)


def shown(table, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_markdown_has_names_at_the_left_and_numbers_at_the_right():
    assert TABLE.markdown().splitlines() == [
        "<a> [b]title[/b]",
        "",
        "| name | time, ms | [bold] |",
        "| --- | ---: | ---: |",
        "| a & b | 1.0 | 2 |",
        "| mean | 1.0 |  |",
    ]


def test_html_is_escaped():
    assert TABLE.html().count("<tr>") == 3
    assert "<td>a &amp; b</td><td>1.0</td><td>2</td>" in TABLE.html()


def test_text_with_brackets_is_no_markup_in_a_terminal():
    text = shown(TABLE.rich())
    for part in ("[b]title[/b]", "[bold]", "a & b", "below"):
        assert part in text
    assert "time, ms" not in text, "a unit stands below its name"


def test_cells_of_what_is_not_there_are_empty():
    assert cell(None, ".1f") == points(None) == ""
    assert cell(0.0, ".1f") == "0.0"
    assert points(0.0) == "+0.00"
    assert plus_minus("1.0", None, ".1f") == "1.0"
    assert plus_minus("1.0", 0.02, ".1f") == "1.0 ± 2.0"


def test_layers_have_bars_that_begin_at_the_left():
    text = shown(layer_table({"a": 0.1, "b": 0.2}, {"a": 1.0, "b": 0.5}).rich())
    bars = [line for line in text.splitlines() if "█" in line]
    assert len(bars) == 3
    assert len({line.index("█") for line in bars}) == 1
    assert "75.0%" in bars[-1]
