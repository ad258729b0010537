"""``cats report``: one page of tables and figures from results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cats.cli import options


def report(
    results: Annotated[
        list[Path],
        typer.Argument(help="Results (.jsonl), profiles (.json), or folders that hold some."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Its title.")] = "CATS",
    figures: Annotated[
        Path | None, typer.Option(help="Write each figure into this folder too, as SVG.")
    ] = None,
) -> None:
    """Make a self-contained HTML page of results: tables, figures, settings.

    Example: [b]cats report benchmarks/results profile.json -o report.html[/b]
    """
    from cats.report import Material, plots, write_page
    from cats.storage import replacing

    drawn = write_page(Material.read(results), output, title=title)
    for name, svg in drawn.items() if figures is not None else ():
        assert figures is not None
        with replacing(figures / f"{name}.svg") as temporary:
            temporary.write_text(plots.alone(svg), "utf-8")
    options.out.print(f"wrote {output}", markup=False)
