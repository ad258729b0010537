"""``cats bench curves``: the picture of many runs of fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cats.cli import options
from cats.errors import ConfigError


def curves(
    histories: Annotated[
        list[Path], typer.Argument(help="Histories (.jsonl), or folders that hold some.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="SVG file.")] = Path("curves.svg"),
    best: Annotated[
        bool, typer.Option(help="Of runs that differ in learning rate alone, draw the best.")
    ] = True,
) -> None:
    """Draw the log-perplexity of several runs over steps and tokens.

    Example: [b]cats bench curves results/finetune -o curves.svg[/b]
    """
    from cats.history import History, best_runs
    from cats.report.curves import curves_figure
    from cats.storage import replacing

    options.check_output(output)
    if output.suffix != ".svg":
        raise ConfigError(f"{output}: curves are drawn as SVG, name a file .svg")
    files = [
        f for path in histories for f in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])
    ]
    found = {name: History.load(file) for name, file in _run_names(files).items()}
    svg = curves_figure(best_runs(found) if best else found, output.stem)
    with replacing(output) as temporary:
        temporary.write_text(svg, "utf-8")
    options.out.print(f"wrote {output}", markup=False)


def _run_names(files: list[Path]) -> dict[str, Path]:
    """Name of each run to its file; its whole path where two folders have a run of that name."""
    files = list(dict.fromkeys(files))
    names = [file.parent.name if file.stem == "history" else file.stem for file in files]
    return {
        name if names.count(name) == 1 else str(file.with_suffix("")): file
        for name, file in zip(names, files, strict=True)
    }
