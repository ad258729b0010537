"""``cats finetune``: train a sparse model through the neurons that it keeps."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cats.cli import finetune_options as shared
from cats.cli import options
from cats.cli.finetune_bar import StepBar, first_process
from cats.cli.finetune_data import Data, pairs_of
from cats.cli.running import resumable
from cats.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from cats.history import History

_adapter_option = partial(typer.Option, rich_help_panel="Adapters")


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
    text: shared.Text = None,
    pairs: shared.PairSources = None,
    prompt: shared.Prompt = "{question}",
    answer: shared.Answer = "{answer}",
    labels: shared.Labels = None,
    eval_text: shared.EvalText = None,
    eval_pairs: shared.EvalPairs = None,
    accuracy: shared.Accuracy = False,
    max_new_tokens: shared.MaxNewTokens = None,
    answer_batch_size: shared.AnswerBatchSize = None,
    eval_tokens: shared.EvalTokens = None,
    calibration_text: shared.CalibrationText = None,
    calibration_tokens: shared.CalibrationTokens = None,
    block: shared.Block = 1024,
    bos: options.Bos = None,
    steps: shared.Steps = 500,
    epochs: shared.Epochs = None,
    batch_size: shared.BatchSize = 8,
    accumulate: shared.Accumulate = 1,
    learning_rate: Annotated[
        float,
        shared.training_option(
            "--learning-rate", "--lr", help="At the start; it falls linearly to 0."
        ),
    ] = 1e-5,
    weight_decay: Annotated[float, shared.training_option(help="Of AdamW.")] = 0.01,
    warmup_steps: shared.Warmup = 0,
    rank: Annotated[
        int | None, _adapter_option(min=1, help="Of the adapters.", show_default="64")
    ] = None,
    alpha: Annotated[
        int | None, _adapter_option(min=1, help="Their scale is alpha / rank.", show_default="16")
    ] = None,
    dropout: Annotated[
        float | None, _adapter_option(help="On their input.", show_default="0.1")
    ] = None,
    target: Annotated[
        list[str] | None,
        _adapter_option(help="Layer with adapters; repeatable. Default: q, v, gate, up, down."),
    ] = None,
    full: Annotated[
        bool, _adapter_option("--full", help="Train all weights, no adapters.")
    ] = False,
    distillation: Annotated[
        float,
        shared.training_option(help="Share of the divergence from the dense model in the loss."),
    ] = 0.0,
    recalibrate: Annotated[
        int,
        shared.training_option(min=0, help="Set thresholds anew every so many steps; 0: never."),
    ] = 0,
    gradient_checkpointing: Annotated[
        bool, shared.training_option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    bfloat16: Annotated[
        bool | None,
        typer.Option("--bf16/--no-bf16", help="Compute in bfloat16.", show_default="on a GPU"),
    ] = None,
    eval_every: shared.EvalEvery = 50,
    eval_batch_size: shared.EvalBatchSize = 8,
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
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Fine-tune a sparse model with LoRA, through the neurons that it keeps.

    Example: [b]cats finetune smollm2 --thresholds cats50.safetensors --text c4.txt -o run[/b]

    Example: [b]cats finetune smollm2 --pairs train.parquet --eval-pairs t=test.parquet -o run[/b]

    Several GPUs: [b]torchrun --nproc-per-node 8 $(which cats) finetune ...[/b]
    """
    from cats.config import label_of
    from cats.finetuning import FinetuneOptions
    from cats.finetuning.adapters import check_targets
    from cats.finetuning.run import finetune as run

    rows = Data(
        text=text, pairs=pairs, prompt=prompt, answer=answer, labels=labels, eval_text=eval_text,
        eval_pairs=eval_pairs, calibration_text=calibration_text,
        calibration_tokens=calibration_tokens, eval_tokens=eval_tokens, block=block, seed=seed,
        bos=bos,
    )  # fmt: skip
    _check_method(thresholds, method, sparsity, distillation, recalibrate)
    lora = shared.given(rank=rank, alpha=alpha, dropout=dropout, target=target)
    if full and lora:
        raise ConfigError(f"--full trains no adapters: leave it out, or {shared.named(lora)}")
    chosen = FinetuneOptions(
        steps=steps, batch_size=batch_size, accumulate=accumulate, learning_rate=learning_rate,
        weight_decay=weight_decay, warmup_steps=warmup_steps, targets=tuple(lora.pop("target", ())),
        full=full, distillation=distillation, recalibrate=recalibrate,
        gradient_checkpointing=gradient_checkpointing, bfloat16=bfloat16,
        evaluate_every=eval_every, evaluation_batch_size=eval_batch_size, save_every=save_every,
        keep=keep, seed=seed, report_to=tuple(report_to or ()), **lora,
        **shared.answer_options(accuracy, eval_pairs, max_new_tokens, answer_batch_size),
    )  # fmt: skip
    shared.check_epochs(epochs)
    options.check_output(output / "history.jsonl")
    shared.check_continued(output, chosen, epochs)
    hub = options.hub(revision, subfolder, trust_remote_code)
    loaded, tokenizer = options.load(
        model, thresholds=thresholds, dtype=dtype, device=options.process_device(device),
        dense=method is not None, hub=hub,
    )  # fmt: skip
    check_targets(loaded, chosen.targets)
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
    chosen = shared.with_epochs(chosen, epochs, train)
    kept = output if first_process() else None
    with resumable(kept, _has_checkpoint), StepBar(chosen.steps) as bar:
        tuned = run(
            loaded, train, tokenizer=tokenizer, output=output, options=chosen,
            evaluations=evaluations, answers=pairs_of(evaluations) if accuracy else {},
            calibration=calibration, merge=merge,
            about={"model": model, "revision": revision, **rows.about()},
            on_point=bar.show, on_step=bar.step,
        )  # fmt: skip
    if not first_process():
        return
    if as_json:
        options.print_json(dataclasses.asdict(tuned.history))
    else:
        settings = tuned.history.settings
        label = label_of(settings["method"], settings["target_sparsity"])
        options.out.print(_table(f"{model}, {label}", tuned.history))
        done = f"wrote {output}" if bar.moved else f"{output}: was complete already"
        options.out.print(done, markup=False)


def _has_checkpoint(folder: Path) -> bool:
    from cats.finetuning.trainer import last_checkpoint

    return last_checkpoint(folder) is not None


def _check_method(
    thresholds: Path | None,
    method: str | None,
    sparsity: float | None,
    distillation: float,
    recalibrate: int,
) -> None:
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
            f"--distillation {distillation:g} with --method dense: {shared.OWN_TEACHER}; "
            "leave out one"
        )
    if recalibrate and method in ("dense", "relu"):
        raise ConfigError(
            f"--recalibrate {recalibrate} with --method {method}: {shared.NO_TARGET}; leave out one"
        )


def _sparsify(model: Any, method: str, sparsity: float, calibration: Tensor | None) -> None:
    from cats.apply import sparsify_
    from cats.calibration import calibrate

    if method == "dense":
        return
    assert calibration is not None
    target = sparsity if method == "cats" else None
    batches = options.progress(calibration.split(4), "calibrating", show=first_process())
    sparsify_(model, calibrate(model, batches, target_sparsity=target, method=method))


def _table(title: str, history: History) -> Table:
    """One row an evaluation."""
    from rich.markup import escape
    from rich.table import Table

    from cats.cli.tables import cell
    from cats.history import names_of

    table = Table(title=escape(title), title_justify="left", caption_justify="left")
    names, _ = names_of([history])
    for column in ("step", "tokens", "train", *names, "dropped", "s a step"):
        table.add_column(escape(column), justify="right")
    for point in history.points:
        table.add_row(
            str(point.step),
            f"{point.tokens:,}",
            cell(point.train_loss, ".4f"),
            *(cell(point.losses.get(name), ".4f") for name in names),
            cell(point.sparsity, ".1%"),
            cell(point.seconds_per_step, ".3f"),
        )
    table.caption = "losses are log-perplexities"
    for name, share in history.points[-1].accuracy.items() if history.points else ():
        table.caption += f"; {escape(name)}: {share:.1%} of the answers right"
    return table
