"""``cats report``: make a page of tables and figures from results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cats.cli import options


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS", help="Results (.jsonl), profiles (.json), or folders of them."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Title of the page.")] = "CATS",
    figures: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write each figure into this folder too, as SVG."),
    ] = None,
) -> None:
    """Make a self-contained HTML page of tables and figures from results.

    Example: [b]cats report benchmarks/results profile.json -o report.html[/b]
    """
    from cats.report import Material, plots, write_page
    from cats.storage import replacing

    drawings = write_page(Material.read(results), output, title=title)
    if figures is not None:
        for name, svg in drawings.items():
            with replacing(figures / f"{name}.svg") as temporary:
                temporary.write_text(plots.alone(svg), "utf-8")
    options.out.print(f"wrote {output}", markup=False)
