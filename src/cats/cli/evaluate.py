"""``cats evaluate``: the quality of a model, dense, sparse and quantised."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cats.cli import options
from cats.cli.running import Terminal, resumable
from cats.cli.task_options import check_tasks, parse_batch_size
from cats.errors import ConfigError
from cats.recipes.progress import Progress

if TYPE_CHECKING:
    from torch import nn

    from cats.evaluation.variants import Variant
    from cats.protocols import Tokenizer
    from cats.results import Perplexity, TaskScore, Value

# Blocks per forward pass where --batch-size is auto.
_BLOCKS = 4


def evaluate(
    model: options.Model,
    thresholds: options.Thresholds = None,
    quantised: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR",
            help="Compare with this quantised checkpoint of MODEL, dense and, if it has "
            "thresholds, sparse; repeatable. NAME stands in tables.",
            show_default="int4, int8",
            rich_help_panel="Quantised models",
        ),
    ] = None,
    quantised_thresholds: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE",
            help="Thresholds that were calibrated on the quantised checkpoint NAME; repeatable.",
            rich_help_panel="Quantised models",
        ),
    ] = None,
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
            help="Measure zero-shot tasks: [b]paper8[/b], or names separated by commas. With "
            "--text perplexity too, else instead of it.",
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
            help="Folder for results and answers; a stopped run continues from the answers.",
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
    device: options.SpreadDevice = "auto",
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure the quality of a model, dense, sparse and quantised: perplexity, zero-shot tasks.

    Example: [b]cats evaluate smollm2 --thresholds cats50.safetensors --text wiki.txt[/b]

    Example: [b]cats evaluate smollm2 --thresholds cats50.safetensors --tasks paper8 -o DIR[/b]

    Example: [b]cats evaluate smollm2 --quantised smollm2-int4 --text wiki.txt[/b]

    Several processes share the work under [b]torchrun[/b] and find the same numbers.
    """
    batch = parse_batch_size(batch_size)
    _check_options(tasks, text, tokens, bos, limit, data_dir)
    checkpoints = _named(quantised or [], "--quantised", "DIR")
    threshold_files = _named(quantised_thresholds or [], "--quantised-thresholds", "FILE")
    if threshold_files and len(checkpoints) == 1 and [*threshold_files] == [""]:
        threshold_files = {name: threshold_files[""] for name in checkpoints}
    if unknown := threshold_files.keys() - checkpoints.keys():
        raise ConfigError(
            f"--quantised-thresholds {min(unknown)}: no --quantised of that name; write "
            "NAME=FILE beside --quantised NAME=DIR"
        )
    options.check_output(output and output / "results.jsonl")
    options.check_tokens(tokens, block)
    names = [] if tasks is None else check_tasks(tasks, data_dir)
    hub = options.hub(revision, subfolder, trust_remote_code)
    device = options.process_device(device)
    loaded, tokenizer = options.load(
        model, thresholds=thresholds, dtype=dtype, device=device, threads=threads, hub=hub
    )
    from cats.cli.tables import perplexity_table
    from cats.processes import join_processes

    rank, _ = join_processes()

    if tasks is not None or checkpoints or output is not None:
        from cats.apply import densify_
        from cats.evaluation.run import identity

        variants = _variants(loaded, model, hub, thresholds)
        densify_(loaded)
        dtype = options.Dtype(str(loaded.dtype).removeprefix("torch."))
        for name, folder in checkpoints.items():
            file = threshold_files.get(name)
            variants += _in_codes(
                name, folder, file, tokenizer, dtype=dtype, device=device, trust=trust_remote_code
            )
        _check_labels(variants)
        settings = {"model": model, **identity(loaded, tokenizer), "revision": revision}
        perplexities: list[Perplexity] = []
        scores: list[TaskScore] = []
        if text or tasks is None:
            perplexities = _perplexities(
                loaded, tokenizer, variants, settings, text, tokens, block, bos, batch, output
            )
        if tasks is not None:
            scores = _scores(
                loaded, tokenizer, variants, settings, names, limit, seed, batch, data_dir, output
            )
        if rank > 0:
            return
        if as_json:
            rows = [_perplexity_json(record) for record in perplexities]
            options.print_json([*rows, *map(_task_json, scores)])
        else:
            _print(model, perplexities, scores)
        return
    from cats.data import text_start, token_blocks
    from cats.recipes.evaluation import compare_perplexities

    most = None if tokens is None else tokens // block
    with options.err.status("reading the text ..."):
        blocks = token_blocks(
            tokenizer, options.texts_or_sample(text), length=block, limit=most, bos=bos
        )
    batches = blocks.split(_BLOCKS if batch == "auto" else int(batch))
    measured = compare_perplexities(loaded, batches, progress=_progress())
    if rank > 0:
        return
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


def _perplexities(
    model: nn.Module,
    tokenizer: Tokenizer,
    variants: list[Variant],
    settings: dict[str, Value],
    text: list[Path] | None,
    tokens: int | None,
    block: int,
    bos: bool | None,
    batch: int | str,
    output: Path | None,
) -> list[Perplexity]:
    from cats.data import text_start, token_blocks
    from cats.recipes.evaluation import measure_perplexities

    most = None if tokens is None else tokens // block
    with options.err.status("reading the text ..."):
        texts = options.texts_or_sample(text)
        blocks = token_blocks(tokenizer, texts, length=block, limit=most, bos=bos)
    return measure_perplexities(
        model,
        variants,
        blocks.split(_BLOCKS if batch == "auto" else int(batch)),
        text=options.describe_texts(text),
        settings=settings | {"bos": bool(text_start(tokenizer, bos)) or None},
        folder=output,
        progress=_progress(),
    )


def _scores(
    model: nn.Module,
    tokenizer: Tokenizer,
    variants: list[Variant],
    settings: dict[str, Value],
    names: list[str],
    limit: int | None,
    seed: int,
    batch: int | str,
    data_dir: Path | None,
    output: Path | None,
) -> list[TaskScore]:
    from cats.processes import rank_and_number
    from cats.recipes.evaluation import ask_tasks, write_results

    with resumable(output, _has_answers):
        scores = ask_tasks(
            model,
            tokenizer,
            variants,
            names,
            folder=output and output / "answers",
            settings=settings,
            limit=limit,
            seed=seed,
            batch_size=batch,
            data_dir=data_dir,
            progress=_progress(),
        )
    if output is not None and rank_and_number()[0] == 0:
        write_results(output / "results.jsonl", scores)
    return scores


def _progress() -> Progress:
    """The terminal of the first process; the others are silent."""
    from cats.processes import rank_and_number

    return Terminal() if rank_and_number()[0] == 0 else Progress()


def _print(model: str, perplexities: list[Perplexity], scores: list[TaskScore]) -> None:
    from cats.cli.tables import task_table
    from cats.report.quality import tables

    if perplexities:
        summary = tables([*perplexities, *scores])[0]
        options.out.print(summary.rich())
    if scores:
        options.out.print(task_table(f"{model}, zero-shot", scores).rich())


def _check_options(
    tasks: str | None,
    text: list[Path] | None,
    tokens: int | None,
    bos: bool | None,
    limit: int | None,
    data_dir: Path | None,
) -> None:
    """Refuse an option that would be ignored."""
    of_text = {"--tokens": tokens, "--bos/--no-bos": bos}
    of_tasks = {"--limit": limit, "--data-dir": data_dir}
    for name, value in of_tasks.items():
        if tasks is None and value is not None:
            raise ConfigError(f"{name} goes with --tasks")
    for name, value in of_text.items():
        if tasks is not None and not text and value is not None:
            raise ConfigError(f"{name} is of perplexity, not of --tasks: give --text too")


def _named(values: list[str], option: str, kind: str) -> dict[str, Path]:
    """``NAME=PATH`` values by name; a single value may have none."""
    named: dict[str, Path] = {}
    for value in values:
        name, has_name, path = value.partition("=")
        if "/" in name:  # a path that has such a sign
            name, has_name, path = "", "", value
        if has_name and (not name or name == "dense"):
            raise ConfigError(
                f"{option} {value}: {name!r} is no name for a table, write NAME={kind}"
            )
        if not has_name and len(values) > 1:
            raise ConfigError(f"{option}: several need a name each, {option} NAME={kind}")
        if name in named:
            raise ConfigError(f"{option}: two are named {name}")
        named[name if has_name else ""] = Path(path if has_name else value)
    return named


def _in_codes(
    name: str,
    folder: Path,
    thresholds: Path | None,
    tokenizer: Tokenizer,
    *,
    dtype: options.Dtype,
    device: str,
    trust: bool,
) -> list[Variant]:
    """A quantised checkpoint, and the same with its thresholds where it has some.

    Raises:
        ConfigError: If it is not quantised, or its tokenizer splits text otherwise.
    """
    from cats.checkpoint import is_sparse_checkpoint, read_config
    from cats.config import CatsConfig
    from cats.data import sample_text
    from cats.evaluation.variants import InCodes, Sparse

    hub = options.hub(None, None, trust)
    model, own_tokenizer = options.load(
        str(folder), dtype=dtype, device=device, dense=True, hub=hub
    )
    sample = sample_text()[:4096]
    if own_tokenizer(sample)["input_ids"] != tokenizer(sample)["input_ids"]:
        raise ConfigError(
            f"--quantised {folder}: its tokenizer splits text otherwise than that of MODEL, so "
            "that the two cannot be compared"
        )
    dense = InCodes(model, name=name or None)
    config = None
    if thresholds is not None:
        config = CatsConfig.load(thresholds)
    elif is_sparse_checkpoint(folder):
        config = read_config(folder)
    if config is None:
        return [dense]
    sparse = InCodes(model, Sparse(config), name=name or None)
    # thresholds of another model are refused before the long work
    with sparse.on(model):
        pass
    return [dense, sparse]


def _check_labels(variants: list[Variant]) -> None:
    labels = [variant.label for variant in variants]
    if len({*labels}) < len(labels):
        raise ConfigError(f"two variants have one name in {', '.join(labels)}: choose other names")


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


def _perplexity_json(record: Perplexity) -> dict[str, object]:
    names = (
        "variant",
        "text",
        "tokens",
        "realized_sparsity",
        "bits",
        "token_bytes",
        "loss_difference",
        "loss_difference_stderr",
    )
    return {
        "metric": record.quantity,
        "value": record.value,
        **{name: getattr(record, name) for name in names},
    }
