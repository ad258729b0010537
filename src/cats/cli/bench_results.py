"""``cats bench results``: show, join, draw and quote files of results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from cats.cli import options
from cats.cli.bench_options import print_legend, shape_of
from cats.errors import ConfigError, DataError, StorageError

if TYPE_CHECKING:
    from cats.report import mlp, tokens
    from cats.results import Result

app = typer.Typer(help="Show, join, draw and quote files of results.", no_args_is_help=True)
_Measured = Annotated[
    Path,
    typer.Argument(
        help="What cats bench mlp, decode, timeline, peer or sessions wrote.", metavar="RESULTS"
    ),
]
_Picture = Annotated[Path, typer.Option("--output", "-o", help="Picture, .svg or .png.")]


@app.command()
def show(file: _Measured) -> None:
    """Print the tables of a results file."""
    from cats.report import mlp, peers, sessions, timeline, tokens

    for benchmark, results in _by_benchmark(file).items():
        if benchmark == "timeline":
            tables = [timeline.table(panel) for panel in timeline.panels(results)]
        elif benchmark == "mlp":
            tables = [mlp.table(panel) for panel in mlp.panels(results)]
        elif benchmark == "peer":
            tables = peers.tables(results)
        elif benchmark == "sessions":
            tables = sessions.tables(results)
        else:
            tables = [table for panel in tokens.panels(results) for table in tokens.tables(panel)]
        for table in tables:
            options.out.print(table.rich())
        legends = {"decode": tokens.LEGEND, "peer": peers.LEGEND, "sessions": sessions.LEGEND}
        if benchmark in legends:
            print_legend(legends[benchmark])


@app.command()
def join(
    files: Annotated[list[Path], typer.Argument(help="Results of cats bench, in this order.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write; it is replaced.")],
) -> None:
    """Join results files into one: checked, each result once, with the name of its run.

    Example: [b]cats bench results join OUT/decode-*.jsonl -o decode.jsonl[/b]
    """
    from cats.results import join_results, run_of
    from cats.storage import replacing

    options.check_output(output)
    results = join_results(files)
    with replacing(output) as temporary:
        temporary.write_text("".join(result.to_json() + "\n" for result in results), "utf-8")
    runs = len({run_of(result) for result in results})
    options.out.print(f"wrote {output}: {len(results)} results of {runs} runs", markup=False)


@app.command()
def plot(
    file: _Measured,
    output: _Picture,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="Only MLPs of this shape, timed in chained calls; repeatable.", metavar="DxF"
        ),
    ] = None,
    prompt_length: Annotated[
        int | None,
        typer.Option(help="Only tokens after one prompt of this length.", metavar="N"),
    ] = None,
) -> None:
    """Draw a results file: time or tokens per second against sparsity, or a timeline."""
    from cats.report import mlp, peers, plots, timeline, tokens

    options.check_output(output)
    plots.check_name(output)
    by_benchmark = _by_benchmark(file)
    if len(by_benchmark) > 1:
        names = " and ".join(sorted(by_benchmark))
        raise DataError(f"{file} holds results of {names}: a picture shows one of them")
    ((benchmark, results),) = by_benchmark.items()
    if shape and benchmark != "mlp":
        raise ConfigError("--shape is for results of cats bench mlp")
    if prompt_length is not None and benchmark != "decode":
        raise ConfigError("--prompt-length is for results of cats bench decode")
    if benchmark == "sessions":
        raise DataError(f"{file}: sessions are a table, not a picture: cats bench results show")
    if benchmark == "timeline":
        figure = timeline.plot(timeline.panels(results))
    elif benchmark == "peer":
        figure = peers.plot(results)
    elif benchmark == "decode":
        figure = tokens.plot(_with_prompt(file, tokens.panels(results), prompt_length))
    else:
        figure = mlp.plot(_with_shape(file, mlp.panels(results), shape or []))
    plots.save(figure, output)
    options.out.print(f"wrote {output}", markup=False)


@app.command()
def curves(
    histories: Annotated[
        list[Path], typer.Argument(help="Histories (.jsonl), or folders that hold some.")
    ],
    output: _Picture = Path("curves.svg"),
    best: Annotated[
        bool, typer.Option(help="Of runs that differ only in learning rate, draw the best one.")
    ] = True,
) -> None:
    """Draw the log-perplexity of several fine-tuning runs over steps and tokens.

    Example: [b]cats bench results curves results/finetune -o curves.svg[/b]
    """
    from cats.history import History, best_runs
    from cats.report import finetuning, plots

    options.check_output(output)
    plots.check_name(output)
    files = [
        f for path in histories for f in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])
    ]
    runs = {name: History.load(file) for name, file in run_names(files).items()}
    plots.save(finetuning.curves(best_runs(runs) if best else runs), output)
    options.out.print(f"wrote {output}", markup=False)


@app.command()
def quote(
    documents: Annotated[list[Path], typer.Argument(help="Markdown files that quote results.")],
    check: Annotated[
        bool,
        typer.Option("--check", help="Change no document; fail if a table or number differs."),
    ] = False,
) -> None:
    """Renew the tables and numbers in documents from the results files that they name.

    Example: [b]cats bench results quote README.md --check[/b]
    """
    from cats.report.quotes import requote
    from cats.storage import replacing

    for document in documents:
        if not document.is_file():
            raise StorageError(f"{document}: no such file")
        text, old = requote(document), document.read_text(encoding="utf-8")
        if text == old:
            continue
        if check:
            differing = zip_longest(old.split("\n"), text.split("\n"), fillvalue="")
            number, (old_line, new_line) = next(
                (number, lines) for number, lines in enumerate(differing, 1) if lines[0] != lines[1]
            )
            raise DataError(
                f"{document}, line {number}, does not say what its results file says; "
                f"cats bench results quote {document} mends that:\n- {old_line}\n+ {new_line}"
            )
        with replacing(document) as temporary:
            temporary.write_text(text, encoding="utf-8")
        options.out.print(f"wrote {document}", markup=False)


def moved(name: str) -> Callable[[], NoReturn]:
    """A command of an earlier release: it says its new name and ends with code 2."""

    def command() -> NoReturn:
        options.err.print(
            f"cats bench {name} is now: cats bench results {name}", markup=False, highlight=False
        )
        raise typer.Exit(2)

    return command


def _by_benchmark(file: Path) -> dict[str, list[Result]]:
    """Name of each benchmark to its results; other results of the file are left out.

    Raises:
        DataError: If there are none.
    """
    from cats.results import read_results

    results: dict[str, list[Result]] = {}
    for result in read_results(file):
        if result.benchmark in ("mlp", "decode", "timeline", "peer", "sessions"):
            results.setdefault(result.benchmark, []).append(result)
    if not results:
        raise DataError(
            f"{file} has no result of cats bench mlp, decode, timeline, peer or sessions"
        )
    return results


def _with_prompt(
    file: Path, panels: Sequence[tokens.Panel], prompt_length: int | None
) -> Sequence[tokens.Panel]:
    if prompt_length is None:
        return panels
    chosen = [p for p in panels if (p.batch, p.prompt_length) == (1, prompt_length)]
    if not chosen:
        raise DataError(f"{file} has no results of one prompt of {prompt_length} tokens")
    return chosen


def _with_shape(
    file: Path, panels: Sequence[mlp.Panel], shapes: Sequence[str]
) -> Sequence[mlp.Panel]:
    if not shapes:
        return panels
    sizes = [shape_of(text) for text in shapes]
    chained = [p for p in panels if p.neighbour == "none" and p.batch == 1]
    chosen = [p for p in chained if (p.hidden_size, p.intermediate_size) in sizes]
    if not chosen:
        raise DataError(f"{file} has no results of {', '.join(shapes)}")
    return chosen


def run_names(files: list[Path]) -> dict[str, Path]:
    """Name of each run to its file. A name that two folders have is the full path instead."""
    files = list(dict.fromkeys(files))
    names = [file.parent.name if file.stem == "history" else file.stem for file in files]
    return {
        name if names.count(name) == 1 else str(file.with_suffix("")): file
        for name, file in zip(names, files, strict=True)
    }
