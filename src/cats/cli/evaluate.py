"""``cats evaluate``: the quality of a model, dense and sparse."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cats.cli import options
from cats.cli.running import Terminal, resumable

if TYPE_CHECKING:
    from rich.table import Table

    from cats.evaluation.variants import Variant
    from cats.results import Result

# Blocks a forward pass where --batch-size is auto.
_BLOCKS = 4


def evaluate(
    model: options.Model,
    thresholds: options.Thresholds = None,
    text: options.Texts = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=2, help="Evaluate on at most so many, in whole blocks.", show_default="all"
        ),
    ] = None,
    block: options.Block = 512,
    bos: options.Bos = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Zero-shot tasks instead of perplexity: [b]paper8[/b], or names, with commas "
            "between."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Questions a task, drawn by --seed.", show_default="all"),
    ] = None,
    seed: options.Seed = 0,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Take the tasks' data from TASK/SPLIT.parquet in this folder, such as "
            "piqa/validation.parquet: columns as in the task's own data set."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for the tasks' answers; a run continues from it."
        ),
    ] = None,
    batch_size: Annotated[
        str,
        typer.Option(
            help="Blocks or questions a forward pass; auto: 4 blocks, and as many questions as "
            "the GPU holds (16 on a CPU)."
        ),
    ] = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Perplexity or zero-shot tasks of a model, and of its sparse form beside it.

    Example: [b]cats evaluate smollm2 --thresholds cats50.safetensors --text wiki.txt[/b]

    Example: [b]cats evaluate smollm2 --thresholds cats50.safetensors --tasks paper8 -o DIR[/b]
    """
    batch = parse_batch_size(batch_size)
    _check_options(tasks, text, tokens, bos, limit, data_dir, output)
    options.check_output(output and output / "results.jsonl")
    options.check_tokens(tokens, block)
    names = [] if tasks is None else check_tasks(tasks, data_dir)
    hub = options.hub(revision, subfolder, trust_remote_code)
    loaded, tokenizer = options.load(
        model, thresholds=thresholds, dtype=dtype, device=device, threads=threads, hub=hub
    )
    if tasks is not None:
        from cats.apply import densify_
        from cats.evaluation.run import identity
        from cats.recipes.evaluation import ask_tasks, write_results

        variants = _variants(loaded, model, hub, thresholds)
        densify_(loaded)
        settings = {"model": model, **identity(loaded, tokenizer), "revision": revision}
        with resumable(output, _has_answers):
            results = ask_tasks(
                loaded,
                tokenizer,
                variants,
                names,
                folder=output and output / "answers",
                settings=settings,
                limit=limit,
                seed=seed,
                batch_size=batch,
                data_dir=data_dir,
                progress=Terminal(),
            )
        if output is not None:
            write_results(output / "results.jsonl", results)
        _print_tasks(model, results, as_json)
        return
    from cats.data import text_start, token_blocks
    from cats.recipes.evaluation import compare_perplexities

    most = None if tokens is None else tokens // block
    with options.err.status("reading the text ..."):
        blocks = token_blocks(
            tokenizer, options.texts_or_sample(text), length=block, limit=most, bos=bos
        )
    batches = blocks.split(_BLOCKS if batch == "auto" else int(batch))
    found = compare_perplexities(loaded, batches, progress=Terminal())
    report = {
        "model": model,
        "text": options.describe_texts(text),
        "tokens": blocks.numel(),
        "bos": bool(text_start(tokenizer, bos)),
        "perplexity_dense": found.dense,
    }
    if found.sparse is not None:
        report |= {
            "method": found.method,
            "target_sparsity": found.target_sparsity,
            "perplexity_sparse": found.sparse,
            "realized_sparsity": found.realized_sparsity,
        }
    if as_json:
        options.print_json(report)
    else:
        _print(report)


def parse_batch_size(text: str) -> int | str:
    """A positive number, or ``"auto"``."""
    from cats.errors import ConfigError

    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--batch-size: expected auto or a positive number, got {text!r}")
    return int(text)


def check_tasks(tasks: str, data_dir: Path | None) -> list[str]:
    """The names of the tasks, once it is known that they and their files exist."""
    from cats.evaluation.tasks import check_data, task_names

    with options.err.status("looking up the tasks ..."):
        names = task_names(tasks)
        if data_dir is not None:
            check_data(names, data_dir)
    return names


def _check_options(
    tasks: str | None,
    text: list[Path] | None,
    tokens: int | None,
    bos: bool | None,
    limit: int | None,
    data_dir: Path | None,
    output: Path | None,
) -> None:
    """Complain about an option that would be ignored."""
    from cats.errors import ConfigError

    of_text = {"--text": text, "--tokens": tokens, "--bos/--no-bos": bos}
    of_tasks = {"--limit": limit, "--data-dir": data_dir, "--output": output}
    for name, value in (of_tasks if tasks is None else of_text).items():
        if value is not None:
            need = "goes with --tasks" if tasks is None else "is of perplexity, not of --tasks"
            raise ConfigError(f"{name} {need}")


def _has_answers(folder: Path) -> bool:
    return any(folder.glob("answers/*/*.jsonl"))


def _print(report: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from cats.cli.tables import loss
    from cats.config import label_of

    table = Table(
        title=escape(f"{report['model']} on {report['tokens']:,} tokens of {report['text']}"),
        title_justify="left",
    )
    dense = report["perplexity_dense"]
    rows = [{"model": "dense", "perplexity": f"{dense:.3f}"}]
    if "perplexity_sparse" in report:
        realized, sparse = report["realized_sparsity"].values(), report["perplexity_sparse"]
        rows.append(
            {
                "model": label_of(report["method"], report["target_sparsity"]),
                "realised sparsity": f"{sum(realized) / len(realized):.1%}",
                "perplexity": f"{sparse:.3f}",
                "change": loss(dense, sparse),
            }
        )
    # those of the last row: a dense model alone has fewer
    for column in rows[-1]:
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        table.add_row(*(row.get(column, "") for column in rows[-1]))
    options.out.print(table)


def _variants(model: Any, name: str, hub: dict[str, Any], thresholds: Path | None) -> list[Variant]:
    """The dense model, and the sparse one where there are thresholds."""
    from cats.checkpoint import read_config
    from cats.config import CatsConfig
    from cats.evaluation.variants import Dense, Sparse

    if not hasattr(model.config, "cats"):
        return [Dense()]
    stored = read_config(name, **hub) if thresholds is None else None
    return [Dense(), Sparse(stored or CatsConfig.load(thresholds or ""))]


def _print_tasks(model: str, found: list[Result], as_json: bool) -> None:
    if as_json:
        options.print_json([_row(result) for result in found])
    else:
        options.out.print(task_table(f"{model}, zero-shot", found))


def _row(result: Result) -> dict[str, Any]:
    names = ("variant", "task", "split", "stderr", "difference", "difference_stderr")
    return {
        "metric": result.quantity,
        "value": result.value,
        "questions": result.samples,
        **{name: result.settings[name] for name in names},
    }


def task_table(title: str, found: list[Result]) -> Table:
    """One row a task and metric, one column a variant, each with its standard error.

    The difference to the dense model has the error of the paired differences.
    """
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    table.add_column("task")
    table.add_column("metric")
    table.add_column("questions", justify="right")
    variants = list(dict.fromkeys(str(r.settings["variant"]) for r in found))
    for variant in variants:
        table.add_column(variant, justify="right")
        if variant != "dense":
            table.add_column("difference", justify="right")
    rows: dict[tuple[str, str], dict[str, Result]] = {}
    for result in found:
        key = (str(result.settings["task"]), result.quantity)
        rows.setdefault(key, {})[str(result.settings["variant"])] = result
    for (task, metric), by_variant in rows.items():
        first = next(iter(by_variant.values()))
        cells = []
        for variant in variants:
            settings = by_variant[variant].settings
            cells.append(plus_minus(by_variant[variant].value, settings["stderr"]))
            if variant != "dense":
                difference = settings["difference"], settings["difference_stderr"]
                cells.append(plus_minus(*difference, sign=True))
        table.add_row(task, metric, f"{first.samples:,}", *cells)
    splits = {r.settings["task"]: r.settings["split"] for r in found if r.settings["split"]}
    notes = ["splits: " + ", ".join(f"{task} {split}" for task, split in splits.items())]
    calibrated = [r.settings for r in found if r.settings.get("calibration_tokens")]
    if calibrated:
        tokens, text = calibrated[0]["calibration_tokens"], calibrated[0]["calibration_hash"]
        notes.append(f"calibrated on {tokens:,} tokens (hash {text})")
    table.caption = "\n".join(notes)
    return table


def plus_minus(value: Any, error: Any, *, sign: bool = False) -> str:
    """A share and its standard error, in percent."""
    number = f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"
    return number if error is None else f"{number} ± {100 * error:.1f}"
