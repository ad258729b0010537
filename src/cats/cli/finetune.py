"""``cats finetune``, and ``cats bench finetune`` and ``curves``: many runs, and their picture."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cats.cli import options

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from cats.finetuning import FinetuneOptions, Pairs
    from cats.finetuning.data import Blocks, Examples
    from cats.finetuning.sweep import Run
    from cats.history import History, Point

# Sections of the help.
_DATA, _EVALUATION, _TRAINING, _ADAPTERS = "Data", "Evaluation", "Training", "Adapters"
# Why some methods go without an option.
_OWN_TEACHER = "a dense model would be its own teacher"
_NO_TARGET = "only cats has a target sparsity to calibrate for"

Text = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        help="Text to learn: .txt, .jsonl (both .gz too), .parquet, a part such as "
        r"c4.txt.gz\[:50%], or a Hugging Face id NAME:CONFIG:SPLIT; repeatable.",
        show_default="RefinedWeb, streamed",
        rich_help_panel=_DATA,
    ),
]
PairSources = Annotated[
    list[str] | None,
    typer.Option(
        "--pairs",
        help="Prompts and answers to learn: .jsonl, .parquet or an id; repeatable.",
        rich_help_panel=_DATA,
    ),
]
EvalText = Annotated[
    list[str] | None,
    typer.Option(
        "--eval-text",
        help="NAME=TEXT, measured while training; repeatable.",
        rich_help_panel=_EVALUATION,
    ),
]
EvalPairs = Annotated[
    list[str] | None,
    typer.Option(
        "--eval-pairs",
        help="NAME=PAIRS, measured while training; repeatable.",
        rich_help_panel=_EVALUATION,
    ),
]
Prompt = Annotated[
    str,
    typer.Option(
        help=r"How a row of pairs becomes a prompt, such as {passage}\n{question}?",
        rich_help_panel=_DATA,
    ),
]
Answer = Annotated[str, typer.Option(help="How it becomes an answer.", rich_help_panel=_DATA)]
Labels = Annotated[
    str | None,
    typer.Option(
        help="Names of a numbered answer by commas, such as no,yes.", rich_help_panel=_DATA
    ),
]
Accuracy = Annotated[
    bool,
    typer.Option(
        "--accuracy",
        help="Generate answers to --eval-pairs at the end and count the right ones.",
        rich_help_panel=_EVALUATION,
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Longest answer, with --accuracy.",
        show_default="256",
        rich_help_panel=_EVALUATION,
    ),
]
AnswerBatchSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Answers generated at once, with --accuracy.",
        show_default="64",
        rich_help_panel=_EVALUATION,
    ),
]
EvalTokens = Annotated[
    int,
    typer.Option(min=2, help="Tokens of each --eval-text, at most.", rich_help_panel=_EVALUATION),
]
CalibrationText = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration-text",
        help="For thresholds. Default: what is learnt; repeatable.",
        rich_help_panel=_DATA,
    ),
]
CalibrationTokens = Annotated[
    int, typer.Option(min=1, help="Calibrate on at most so many.", rich_help_panel=_DATA)
]
Block = Annotated[
    int, typer.Option(min=2, help="Tokens a block, or of a pair.", rich_help_panel=_DATA)
]
Steps = Annotated[int, typer.Option(min=1, help="Optimiser steps.", rich_help_panel=_TRAINING)]
Epochs = Annotated[
    float | None,
    typer.Option(help="Passes over the data, in the place of --steps.", rich_help_panel=_TRAINING),
]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Rows a forward pass of one process.", rich_help_panel=_TRAINING)
]
Accumulate = Annotated[
    int, typer.Option(min=1, help="Forward passes a step.", rich_help_panel=_TRAINING)
]
EvalBatchSize = Annotated[
    int,
    typer.Option(
        "--eval-batch-size",
        min=1,
        help="Rows a forward pass of an evaluation.",
        rich_help_panel=_EVALUATION,
    ),
]
EvalEvery = Annotated[
    int,
    typer.Option(
        "--eval-every", min=1, help="Steps between evaluations.", rich_help_panel=_EVALUATION
    ),
]
Warmup = Annotated[
    int, typer.Option("--warmup-steps", min=0, help="Steps of warm-up.", rich_help_panel=_TRAINING)
]
Commit = Annotated[
    str | None, typer.Option(help="Commit to record, where the sources are no checkout.")
]


def finetune(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the run; a run continues from it.")
    ],
    thresholds: options.Thresholds = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="cats, relu or dense, where there are no thresholds yet.", show_default="cats"
        ),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Target of --method cats.", show_default="0.5")
    ] = None,
    text: Text = None,
    pairs: PairSources = None,
    prompt: Prompt = "{question}",
    answer: Answer = "{answer}",
    labels: Labels = None,
    eval_text: EvalText = None,
    eval_pairs: EvalPairs = None,
    accuracy: Accuracy = False,
    max_new_tokens: MaxNewTokens = None,
    answer_batch_size: AnswerBatchSize = None,
    eval_tokens: EvalTokens = 100_000,
    calibration_text: CalibrationText = None,
    calibration_tokens: CalibrationTokens = 100_000,
    block: Block = 1024,
    steps: Steps = 500,
    epochs: Epochs = None,
    batch_size: BatchSize = 8,
    accumulate: Accumulate = 1,
    learning_rate: Annotated[
        float,
        typer.Option(
            "--learning-rate",
            "--lr",
            help="At the start; it falls linearly to 0.",
            rich_help_panel=_TRAINING,
        ),
    ] = 1e-5,
    weight_decay: Annotated[
        float, typer.Option(help="Of AdamW.", rich_help_panel=_TRAINING)
    ] = 0.01,
    warmup_steps: Warmup = 0,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Of the adapters.", show_default="64", rich_help_panel=_ADAPTERS),
    ] = None,
    alpha: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Their scale is alpha / rank.",
            show_default="16",
            rich_help_panel=_ADAPTERS,
        ),
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option(help="On their input.", show_default="0.1", rich_help_panel=_ADAPTERS),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Layer with adapters; repeatable. Default: q, v, gate, up, down.",
            rich_help_panel=_ADAPTERS,
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="Train all weights, no adapters.", rich_help_panel=_ADAPTERS),
    ] = False,
    distillation: Annotated[
        float,
        typer.Option(
            help="Share of the divergence from the dense model in the loss.",
            rich_help_panel=_TRAINING,
        ),
    ] = 0.0,
    recalibrate: Annotated[
        int,
        typer.Option(
            min=0,
            help="Set thresholds anew every so many steps; 0: never.",
            rich_help_panel=_TRAINING,
        ),
    ] = 0,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=_TRAINING
        ),
    ] = False,
    bfloat16: Annotated[
        bool | None,
        typer.Option("--bf16/--no-bf16", help="Compute in bfloat16.", show_default="on a GPU"),
    ] = None,
    eval_every: EvalEvery = 50,
    eval_batch_size: EvalBatchSize = 8,
    save_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints.")] = 100,
    keep: Annotated[int, typer.Option(min=1, help="Checkpoints that are kept.")] = 2,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write merged/: a sparse checkpoint, no adapters.")
    ] = False,
    report_to: Annotated[
        list[str] | None, typer.Option(help="tensorboard, wandb, ...; repeatable.")
    ] = None,
    seed: options.Seed = 0,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Fine-tune a sparse model with LoRA, through the neurons that it keeps.

    Example: [b]cats finetune smollm2 --thresholds cats50.safetensors --text c4.txt -o run[/b]

    Example: [b]cats finetune smollm2 --pairs train.parquet --eval-pairs t=test.parquet -o run[/b]

    Several GPUs: [b]torchrun --nproc-per-node 8 $(which cats) finetune ...[/b]
    """
    from cats.errors import ConfigError
    from cats.finetuning import FinetuneOptions
    from cats.finetuning.run import finetune as run

    rows = _Data(
        text=text, pairs=pairs, prompt=prompt, answer=answer, labels=labels, eval_text=eval_text,
        eval_pairs=eval_pairs, calibration_text=calibration_text,
        calibration_tokens=calibration_tokens, eval_tokens=eval_tokens, block=block, seed=seed,
    )  # fmt: skip
    _check_method(thresholds, method, sparsity, distillation, recalibrate)
    lora = _given(rank=rank, alpha=alpha, dropout=dropout, target=target)
    if full and lora:
        raise ConfigError(f"--full trains no adapters: leave it out, or {_named_options(lora)}")
    chosen = FinetuneOptions(
        steps=steps, batch_size=batch_size, accumulate=accumulate, learning_rate=learning_rate,
        weight_decay=weight_decay, warmup_steps=warmup_steps, targets=tuple(lora.pop("target", ())),
        full=full, distillation=distillation, recalibrate=recalibrate,
        gradient_checkpointing=gradient_checkpointing, bfloat16=bfloat16,
        evaluate_every=eval_every, evaluation_batch_size=eval_batch_size, save_every=save_every,
        keep=keep, seed=seed, report_to=tuple(report_to or ()), **lora,
        **_answer_options(accuracy, eval_pairs, max_new_tokens, answer_batch_size),
    )  # fmt: skip
    _check_epochs(epochs)
    options.check_output(output / "history.jsonl")
    loaded, tokenizer = options.load(
        model, thresholds=thresholds, dtype=dtype, device=options.process_device(device),
        dense=method is not None,
    )  # fmt: skip
    sparse = hasattr(loaded.config, "cats")
    if sparse and sparsity is not None and thresholds is None:
        raise ConfigError(f"{model} has thresholds: calibrate it anew with --method cats")
    with options.err.status("reading data ..."):
        train, evaluations = rows.train(tokenizer), rows.evaluations(tokenizer)
    calibration = None
    if recalibrate or (not sparse and method != "dense"):
        calibration = rows.calibration(tokenizer, train)
    elif calibration_text:
        raise ConfigError("--calibration-text has no use: thresholds are there, and stay")
    if not sparse:
        _sparsify(loaded, method or "cats", 0.5 if sparsity is None else sparsity, calibration)
    if epochs is not None:
        chosen = dataclasses.replace(chosen, steps=_steps(epochs, train, chosen))
    with _bar(chosen.steps) as bar:
        tuned = run(
            loaded, train, tokenizer=tokenizer, output=output, options=chosen,
            evaluations=evaluations, answers=_answers(evaluations) if accuracy else {},
            calibration=calibration, merge=merge, about={"model": model, **rows.about()},
            on_point=bar.show, on_step=bar.step,
        )  # fmt: skip
    if not _first():
        return
    if as_json:
        options.print_json(_json(tuned.history))
    else:
        options.out.print(history_table(f"{model}, {label(tuned.history)}", tuned.history))
        done = f"wrote {output}" if bar.moved else f"{output}: was complete already"
        options.out.print(done, markup=False)


def sweep(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the histories, one file a run.")
    ],
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="dense, relu, or cats-50 for 50 %; repeatable.",
            show_default="dense, cats-50, cats-70, relu",
        ),
    ] = None,
    learning_rate: Annotated[
        list[float] | None,
        typer.Option(
            "--learning-rate",
            "--lr",
            help="Repeatable.",
            show_default="1e-5",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    distillation: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of distillation, of sparse runs; repeatable.",
            show_default="0",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    recalibrate: Annotated[
        list[int] | None,
        typer.Option(
            help="Steps between calibrations, of CATS; repeatable.",
            show_default="0",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    text: Text = None,
    pairs: PairSources = None,
    prompt: Prompt = "{question}",
    answer: Answer = "{answer}",
    labels: Labels = None,
    eval_text: EvalText = None,
    eval_pairs: EvalPairs = None,
    accuracy: Accuracy = False,
    max_new_tokens: MaxNewTokens = None,
    answer_batch_size: AnswerBatchSize = None,
    eval_tokens: EvalTokens = 100_000,
    calibration_text: CalibrationText = None,
    calibration_tokens: CalibrationTokens = 100_000,
    block: Block = 1024,
    steps: Steps = 200,
    epochs: Epochs = None,
    batch_size: BatchSize = 16,
    accumulate: Accumulate = 1,
    warmup_steps: Warmup = 0,
    eval_every: EvalEvery = 50,
    eval_batch_size: EvalBatchSize = 16,
    seed: options.Seed = 0,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    commit: Commit = None,
    as_json: options.AsJson = False,
) -> None:
    """Fine-tune with every method, learning rate and share of distillation, and compare.

    Example: [b]cats bench finetune smollm2 --lr 1e-5 --lr 1e-4 --text a.txt -o DIR[/b]

    What [b]-o[/b] holds already is not run again. Each run starts from the same weights and sees
    the same rows in the same order; weights are not kept.
    """
    from cats.errors import TrainingError
    from cats.finetuning import FinetuneOptions
    from cats.finetuning import sweep as sweeps

    runs = sweeps.grid(
        method or ["dense", "cats-50", "cats-70", "relu"], learning_rate or [1e-5],
        distillation or [0.0], recalibrate or [0],
    )  # fmt: skip
    _check_grid(runs, distillation, recalibrate)
    rows = _Data(
        text=text, pairs=pairs, prompt=prompt, answer=answer, labels=labels, eval_text=eval_text,
        eval_pairs=eval_pairs, calibration_text=calibration_text,
        calibration_tokens=calibration_tokens, eval_tokens=eval_tokens, block=block, seed=seed,
    )  # fmt: skip
    chosen = FinetuneOptions(
        steps=steps, batch_size=batch_size, accumulate=accumulate, warmup_steps=warmup_steps,
        evaluate_every=eval_every, evaluation_batch_size=eval_batch_size, seed=seed,
        **_answer_options(accuracy, eval_pairs, max_new_tokens, answer_batch_size),
    )  # fmt: skip
    _check_epochs(epochs)
    options.check_output(output / "history.jsonl")
    device = options.process_device(device)
    loaded, tokenizer = options.load(model, dtype=dtype, device=device, dense=True)
    with options.err.status("reading data ..."):
        train, evaluations = rows.train(tokenizer), rows.evaluations(tokenizer)
        calibration = rows.calibration(tokenizer, train)
    if epochs is not None:
        chosen = dataclasses.replace(chosen, steps=_steps(epochs, train, chosen))
    found: dict[str, History] = {}
    with _bar(chosen.steps) as bar:

        def on_point(run: sweeps.Run, point: Point) -> None:
            bar.name = run.name
            bar.show(point)

        for run, result in sweeps.sweep(
            loaded, train, runs=runs, tokenizer=tokenizer, folder=output, options=chosen,
            calibration=calibration, evaluations=evaluations,
            answers=_answers(evaluations) if accuracy else {},
            about={"model": model, **rows.about()}, commit=commit,
            on_point=on_point, on_step=lambda run, step: bar.step(step),
        ):  # fmt: skip
            if isinstance(result, TrainingError):
                options.err.print(f"{run.name}: {result}", style="red", markup=False)
            else:
                found[run.name] = result
    if as_json:
        options.print_json({name: _json(history) for name, history in found.items()})
    elif found:
        options.out.print(sweep_table(f"{model}, {chosen.steps} steps", found))
    if not found:
        raise typer.Exit(1)


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
    from cats.errors import ConfigError
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


class _Data:
    """What the options about data come to."""

    def __init__(
        self,
        *,
        text: list[str] | None,
        pairs: list[str] | None,
        eval_text: list[str] | None,
        eval_pairs: list[str] | None,
        prompt: str,
        answer: str,
        labels: str | None,
        calibration_text: list[str] | None,
        calibration_tokens: int,
        eval_tokens: int,
        block: int,
        seed: int,
    ) -> None:
        from cats.errors import ConfigError
        from cats.finetuning import PairFormat

        if text and pairs:
            raise ConfigError("give --text or --pairs, not both")
        form = PairFormat(
            prompt=prompt.replace("\\n", "\n"),
            answer=answer.replace("\\n", "\n"),
            labels=tuple(labels.split(",")) if labels else (),
        )
        if form != PairFormat() and not (pairs or eval_pairs):
            raise ConfigError("--prompt, --answer and --labels are for --pairs and --eval-pairs")
        self._text, self._pairs, self._form = text, pairs, form
        self._eval_text, self._eval_pairs = _named(eval_text), _named(eval_pairs)
        if both := self._eval_text.keys() & self._eval_pairs.keys():
            raise ConfigError(f"two evaluations are called {', '.join(both)}")
        if eval_text:
            options.check_tokens(eval_tokens, block, "--eval-tokens")
        options.check_tokens(calibration_tokens, block, "--calibration-tokens")
        self._calibration_text, self._calibration_tokens = calibration_text, calibration_tokens
        self._eval_tokens, self._block, self._seed = eval_tokens, block, seed

    def about(self) -> dict[str, Any]:
        """Names of the data, for the history."""
        from cats.finetuning.sources import REFINEDWEB, Source

        named = self._pairs or self._text or [REFINEDWEB]
        return {"data": [str(Source.parse(name)) for name in named], "block": self._block}

    def train(self, tokenizer: Any) -> Examples:
        """What to learn; data sets of text are streamed."""
        from cats.finetuning import Blocks, StreamedBlocks
        from cats.finetuning.sources import REFINEDWEB, Source

        if self._pairs:
            return self._read_pairs(tokenizer, self._pairs)
        names = self._text or [REFINEDWEB]
        if all(Source.parse(name).is_file for name in names):
            return Blocks.of_texts(tokenizer, _texts(names), length=self._block)
        return StreamedBlocks(tokenizer, lambda: _texts(names), length=self._block)

    def evaluations(self, tokenizer: Any) -> dict[str, Blocks | Pairs]:
        """Held-out examples by name."""
        from cats.finetuning import Blocks

        limit = self._eval_tokens // self._block
        found: dict[str, Blocks | Pairs] = {
            name: Blocks.of_texts(tokenizer, _texts([text]), length=self._block, limit=limit)
            for name, text in self._eval_text.items()
        }
        return found | {
            name: self._read_pairs(tokenizer, [pairs]) for name, pairs in self._eval_pairs.items()
        }

    def calibration(self, tokenizer: Any, train: Examples) -> Tensor:
        """Blocks for thresholds, drawn by the seed from what is learnt or from other text."""
        import torch

        from cats.finetuning import Blocks, Pairs
        from cats.finetuning.data import pack
        from cats.finetuning.sources import REFINEDWEB

        limit = self._calibration_tokens // self._block
        if self._calibration_text or not isinstance(train, Blocks | Pairs):
            names = self._calibration_text or self._text or [REFINEDWEB]
            return Blocks.of_texts(tokenizer, _texts(names), length=self._block, limit=limit).ids
        blocks = train.ids if isinstance(train, Blocks) else pack(train, length=self._block)
        generator = torch.Generator().manual_seed(self._seed)
        return blocks[torch.randperm(len(blocks), generator=generator)[:limit]]

    def _read_pairs(self, tokenizer: Any, names: list[str]) -> Pairs:
        from cats.finetuning import Pairs
        from cats.finetuning.sources import Source, read_rows

        rows = [row for name in names for row in read_rows(Source.parse(name), self._form.columns)]
        return Pairs.of_texts(
            tokenizer, [self._form.apply(row) for row in rows], length=self._block
        )


def _texts(names: list[str]) -> Iterator[str]:
    from cats.finetuning.sources import Source, read_texts

    for name in names:
        yield from read_texts(Source.parse(name))


def _named(values: list[str] | None) -> dict[str, str]:
    from cats.errors import ConfigError

    found: dict[str, str] = {}
    for value in values or []:
        name, equals, source = value.partition("=")
        if not (name and equals and source) or name in found:
            raise ConfigError(f"expected NAME=FILE, each name once, got {value!r}")
        found[name] = source
    return found


def _check_method(
    thresholds: Path | None,
    method: str | None,
    sparsity: float | None,
    distillation: float,
    recalibrate: int,
) -> None:
    from cats.errors import ConfigError

    if method is not None and thresholds is not None:
        raise ConfigError("give --thresholds, or --method to calibrate, not both")
    if method not in (None, "cats", "relu", "dense"):
        raise ConfigError(f"no method {method!r}: expected cats, relu or dense")
    if sparsity is not None and thresholds is not None:
        raise ConfigError("the thresholds have their target: give --thresholds or --sparsity")
    if sparsity is not None and method not in (None, "cats"):
        raise ConfigError(f"--method {method} has no --sparsity")
    if distillation and method == "dense":
        raise ConfigError(
            f"--distillation {distillation:g} with --method dense: {_OWN_TEACHER}; leave out one"
        )
    if recalibrate and method in ("dense", "relu"):
        raise ConfigError(
            f"--recalibrate {recalibrate} with --method {method}: {_NO_TARGET}; leave out one"
        )


def _check_grid(
    runs: list[Run], distillation: list[float] | None, recalibrate: list[int] | None
) -> None:
    """Say which methods go without an option, and complain where all of them do."""
    from cats.errors import ConfigError

    methods = dict.fromkeys(run.method for run in runs)
    for option, values, takers, reason in (
        ("--distillation", distillation, {r.method for r in runs if r.distillation}, _OWN_TEACHER),
        ("--recalibrate", recalibrate, {r.method for r in runs if r.recalibrate}, _NO_TARGET),
    ):
        without = ", ".join(method for method in methods if method not in takers)
        if not values or not any(values) or not without:
            continue
        if all(values) and not takers:
            raise ConfigError(f"{option} has no use for {without}: {reason}; leave it out")
        options.err.print(f"{without}: without {option}, {reason}", highlight=False)


def _answer_options(
    accuracy: bool,
    eval_pairs: list[str] | None,
    max_new_tokens: int | None,
    answer_batch_size: int | None,
) -> dict[str, Any]:
    """What was given of the options of --accuracy."""
    from cats.errors import ConfigError

    given = _given(max_new_tokens=max_new_tokens, answer_batch_size=answer_batch_size)
    if given and not accuracy:
        raise ConfigError(
            f"without --accuracy no answers are generated: give it, or leave out "
            f"{_named_options(given)}"
        )
    if accuracy and not eval_pairs:
        raise ConfigError("--accuracy needs --eval-pairs")
    return given


def _given(**values: Any) -> dict[str, Any]:
    """The options that were given: those without a value were not."""
    return {name: value for name, value in values.items() if value is not None}


def _named_options(given: dict[str, Any]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in given)


def _check_epochs(epochs: float | None) -> None:
    from cats.errors import ConfigError

    if epochs is not None and not 0 < epochs < float("inf"):
        raise ConfigError(f"--epochs must be positive, got {epochs}")


def _steps(epochs: float, train: Examples, chosen: FinetuneOptions) -> int:
    from cats.errors import ConfigError
    from cats.finetuning import StreamedBlocks

    if isinstance(train, StreamedBlocks):
        raise ConfigError("a stream has no --epochs: give --steps")
    rows_a_step = chosen.batch_size * chosen.accumulate * int(os.environ.get("WORLD_SIZE", "1"))
    return max(1, round(epochs * (len(train) // rows_a_step)))


def _sparsify(model: Any, method: str, sparsity: float, calibration: Tensor | None) -> None:
    from cats.apply import sparsify_
    from cats.calibration import calibrate

    if method == "dense":
        return
    assert calibration is not None
    target = sparsity if method == "cats" else None
    batches = options.progress(calibration.split(4), "calibrating", show=_first())
    sparsify_(model, calibrate(model, batches, target_sparsity=target, method=method))


def _answers(evaluations: dict[str, Blocks | Pairs]) -> dict[str, Pairs]:
    from cats.finetuning import Pairs

    return {name: found for name, found in evaluations.items() if isinstance(found, Pairs)}


def _first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


class _Bar:
    """A bar of steps, and a line for each evaluation above it."""

    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task
        self.name = ""
        self.moved = False

    def step(self, step: int) -> None:
        self.moved = True
        self._progress.update(self._task, completed=step)

    def show(self, point: Point) -> None:
        from rich.markup import escape

        found = [f"{escape(name)} {share:.1%} right" for name, share in point.accuracy.items()]
        # answers come last; what else the point holds was shown when it was measured
        if not found:
            found = [f"{escape(name)} {loss:.4f}" for name, loss in point.losses.items()]
            found += [] if point.train_loss is None else [f"train {point.train_loss:.4f}"]
            found += [] if point.sparsity is None else [f"dropped {point.sparsity:.1%}"]
            seconds = point.seconds_per_step
            found += [] if seconds is None else [f"{seconds:.2f} s a step"]
        if found:
            step = f"{escape(self.name)} step {point.step}".strip()
            self._progress.console.print("  ".join([step, *found]), highlight=False)
        self.step(point.step)


@contextmanager
def _bar(steps: int) -> Iterator[_Bar]:
    with options.bar(show=_first()) as progress:
        yield _Bar(progress, progress.add_task("fine-tuning", total=steps))


def label(history: History) -> str:
    """``cats-50``, ``relu`` or ``dense``."""
    target = history.settings["target_sparsity"]
    return str(history.settings["method"]) + ("" if target is None else f"-{target * 100:g}")


def history_table(title: str, history: History) -> Table:
    """One row an evaluation."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", caption_justify="left")
    names = list(dict.fromkeys(name for p in history.points for name in p.losses))
    for column in ("step", "tokens", "train", *names, "dropped", "s a step"):
        table.add_column(escape(column), justify="right")
    for point in history.points:
        table.add_row(
            str(point.step),
            f"{point.tokens:,}",
            _number(point.train_loss),
            *(_number(point.losses.get(name)) for name in names),
            "" if point.sparsity is None else f"{point.sparsity:.1%}",
            "" if point.seconds_per_step is None else f"{point.seconds_per_step:.3f}",
        )
    table.caption = "losses are log-perplexities"
    for name, share in history.points[-1].accuracy.items() if history.points else ():
        table.caption += f"; {escape(name)}: {share:.1%} of the answers right"
    return table


def sweep_table(title: str, found: dict[str, History]) -> Table:
    """One row a run, with the share of the sparse model's loss that it recovers.

    The loss is counted against the lower of the untuned dense model and the best dense run.
    """
    from rich.markup import escape
    from rich.table import Table

    from cats.history import recovered

    names = list(dict.fromkeys(n for h in found.values() for p in h.points for n in p.losses))
    tasks = list(dict.fromkeys(n for h in found.values() for p in h.points for n in p.accuracy))
    table = Table(title=escape(title), title_justify="left", caption_justify="left")
    table.add_column("run", overflow="fold")
    for name in names:
        table.add_column(escape(name), justify="right")
    for task in tasks:
        table.add_column(f"{escape(task)}\nright", justify="right")
    table.add_column("dropped", justify="right")
    table.add_column("s a step", justify="right")
    for run, history in found.items():
        first, last = history.points[0], history.points[-1]
        cells = []
        for name in names:
            share = recovered(history, found.values(), name)
            cell = f"{_number(first.losses.get(name))} > {_number(last.losses.get(name))}"
            cells.append(cell + ("" if share is None else f" ({share:.0%})"))
        cells += [f"{last.accuracy[t]:.1%}" if t in last.accuracy else "" for t in tasks]
        cells.append("" if last.sparsity is None else f"{last.sparsity:.1%}")
        cells.append("" if last.seconds_per_step is None else f"{last.seconds_per_step:.3f}")
        table.add_row(escape(run), *cells)
    table.caption = "log-perplexity before > after (recovered share of the loss against dense)"
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _json(history: History) -> dict[str, Any]:
    return dataclasses.asdict(history)
