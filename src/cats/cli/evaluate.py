"""``cats evaluate``: the quality of a model, dense and sparse."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cats.cli import options
from cats.cli.running import Terminal, resumable
from cats.cli.task_options import check_tasks, parse_batch_size
from cats.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from cats.evaluation.variants import Variant
    from cats.results import TaskScore

# Blocks per forward pass where --batch-size is auto.
_BLOCKS = 4


def evaluate(
    model: options.Model,
    thresholds: options.Thresholds = None,
    text: options.Texts = None,
    tokens: Annotated[
        int | None,
        options.number(
            min=2,
            help="Use at most N tokens, in whole blocks.",
            show_default="all",
        ),
    ] = None,
    block: options.Block = 512,
    bos: options.Bos = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Measure zero-shot tasks instead of perplexity: [b]paper8[/b], or names separated "
            "by commas.",
            rich_help_panel="Zero-shot tasks",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        options.number(
            min=1,
            help="Questions per task, drawn by --seed.",
            show_default="all",
            rich_help_panel="Zero-shot tasks",
        ),
    ] = None,
    seed: options.Seed = 0,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Read the data of tasks from this folder, in files such as "
            "piqa/validation.parquet, with the columns of the task's own data set.",
            rich_help_panel="Zero-shot tasks",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Folder for the answers; a stopped run continues from it.",
            rich_help_panel="Zero-shot tasks",
        ),
    ] = None,
    batch_size: Annotated[
        str,
        typer.Option(
            metavar="N",
            help="Blocks or questions per forward pass. auto: 4 blocks, or as many questions as "
            "the GPU holds (16 on a CPU).",
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
    """Measure the quality of a model, dense and sparse: perplexity or zero-shot tasks.

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
    from cats.cli.tables import perplexity_table, task_table

    if tasks is not None:
        from cats.apply import densify_
        from cats.evaluation.run import identity
        from cats.recipes.evaluation import ask_tasks, write_results

        variants = _variants(loaded, model, hub, thresholds)
        densify_(loaded)
        settings = {"model": model, **identity(loaded, tokenizer), "revision": revision}
        with resumable(output, _has_answers):
            scores = ask_tasks(
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
            write_results(output / "results.jsonl", scores)
        if as_json:
            options.print_json([_task_json(score) for score in scores])
        else:
            options.out.print(task_table(f"{model}, zero-shot", scores).rich())
        return
    from cats.data import text_start, token_blocks
    from cats.recipes.evaluation import compare_perplexities

    most = None if tokens is None else tokens // block
    with options.err.status("reading the text ..."):
        blocks = token_blocks(
            tokenizer, options.texts_or_sample(text), length=block, limit=most, bos=bos
        )
    batches = blocks.split(_BLOCKS if batch == "auto" else int(batch))
    measured = compare_perplexities(loaded, batches, progress=Terminal())
    text_name = options.describe_texts(text)
    if not as_json:
        title = f"{model} on {blocks.numel():,} tokens of {text_name}"
        options.out.print(perplexity_table(title, measured).rich())
        return
    report = {
        "model": model,
        "text": text_name,
        "tokens": blocks.numel(),
        "bos": bool(text_start(tokenizer, bos)),
        "perplexity_dense": measured.dense,
    }
    if measured.sparse is not None:
        report |= {
            "method": measured.method,
            "target_sparsity": measured.target_sparsity,
            "perplexity_sparse": measured.sparse,
            "realized_sparsity": measured.realized_sparsity,
        }
    options.print_json(report)


def _check_options(
    tasks: str | None,
    text: list[Path] | None,
    tokens: int | None,
    bos: bool | None,
    limit: int | None,
    data_dir: Path | None,
    output: Path | None,
) -> None:
    """Refuse an option that would be ignored."""
    of_text = {"--text": text, "--tokens": tokens, "--bos/--no-bos": bos}
    of_tasks = {"--limit": limit, "--data-dir": data_dir, "--output": output}
    for name, value in (of_tasks if tasks is None else of_text).items():
        if value is not None:
            need = "goes with --tasks" if tasks is None else "is of perplexity, not of --tasks"
            raise ConfigError(f"{name} {need}")


def _has_answers(folder: Path) -> bool:
    return any(folder.glob("answers/*/*.jsonl"))


def _variants(
    model: nn.Module, name: str, hub: options.Hub, thresholds: Path | None
) -> list[Variant]:
    """The dense model, and the sparse one where there are thresholds."""
    from cats.checkpoint import read_config
    from cats.config import CatsConfig
    from cats.evaluation.variants import Dense, Sparse

    if not hasattr(model.config, "cats"):
        return [Dense()]
    stored = read_config(name, **hub) if thresholds is None else None
    return [Dense(), Sparse(stored or CatsConfig.load(thresholds or ""))]


def _task_json(score: TaskScore) -> dict[str, object]:
    names = ("variant", "task", "split", "stderr", "difference", "difference_stderr")
    return {
        "metric": score.quantity,
        "value": score.value,
        "questions": score.samples,
        **{name: getattr(score, name) for name in names},
    }
