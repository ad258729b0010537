"""``cats finetune``: train a sparse model through the neurons that it keeps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from cats.cli import finetune_options as shared
from cats.cli import options
from cats.cli.dataclass_options import Chosen
from cats.cli.finetune_bar import StepBar, first_process
from cats.cli.running import Terminal, resumable
from cats.errors import ConfigError

# Options that --full does not use.
_ADAPTERS = ("rank", "alpha", "dropout", "targets")


@shared.data_options
@shared.tuning_options(
    {
        "Evaluation": shared.EVALUATION,
        "Training": (
            *("steps", "batch_size", "accumulate", "learning_rate", "weight_decay", "warmup_steps"),
            *("distillation", "recalibrate", "gradient_checkpointing"),
        ),
        "Adapters": (*_ADAPTERS, "full"),
        None: ("bfloat16", "save_every", "keep", "report_to"),
    },
)
def finetune(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the run; a stopped run continues.")
    ],
    *,
    thresholds: options.Thresholds = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="cats, relu or dense, for a model without thresholds.", show_default="cats"
        ),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Target of --method cats.", show_default="0.5")
    ] = None,
    data: Chosen,
    accuracy: shared.Accuracy = False,
    tuning: Chosen,
    epochs: shared.Epochs = None,
    bos: options.Bos = None,
    merge: Annotated[
        bool,
        typer.Option("--merge", help="Write a checkpoint without adapters too: merged/."),
    ] = False,
    seed: options.Seed = 0,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Fine-tune a sparse model with LoRA; only the neurons that it keeps take part.

    Example: [b]cats finetune smollm2 --thresholds cats50.safetensors --text c4.txt -o run[/b]

    Example: [b]cats finetune smollm2 --pairs train.parquet --eval-pairs t=test.parquet -o run[/b]

    Several GPUs: [b]torchrun --nproc-per-node 8 $(which cats) finetune ...[/b]
    """
    from cats.cli.tables import evaluation_table
    from cats.config import label_of
    from cats.finetuning import FinetuneOptions
    from cats.finetuning.adapters import check_targets
    from cats.finetuning.run import finetune as run
    from cats.recipes.training import check_epochs, prepare_
    from cats.recipes.training_data import TrainingData

    rows = TrainingData(**data.values, seed=seed, bos=bos)
    _check_method(
        thresholds, method, sparsity, tuning.values["distillation"], tuning.values["recalibrate"]
    )
    adapters = [name for name in _ADAPTERS if name in tuning.typed]
    if tuning.values["full"] and adapters:
        raise ConfigError(f"--full trains no adapters: leave it out, or {shared.named(adapters)}")
    shared.check_answers(tuning, accuracy, rows)
    chosen = FinetuneOptions(**tuning.values, seed=seed)
    check_epochs(epochs)
    options.check_output(output / "history.jsonl")
    shared.check_continued(output, chosen, epochs)
    hub = options.hub(revision, subfolder, trust_remote_code)
    loaded, tokenizer = options.load(
        model,
        thresholds=thresholds,
        dtype=dtype,
        device=options.process_device(device),
        dense=method is not None,
        hub=hub,
    )
    check_targets(loaded, chosen.targets)
    if hasattr(loaded.config, "cats") and sparsity is not None and thresholds is None:
        raise ConfigError(f"{model} has thresholds: give --method cats to calibrate it again")
    ready = prepare_(
        loaded,
        tokenizer,
        rows,
        chosen,
        method=method,
        target_sparsity=sparsity,
        epochs=epochs,
        progress=Terminal() if first_process() else None,
    )
    resumed_from = output if first_process() else None
    with resumable(resumed_from, _has_checkpoint), StepBar(ready.options.steps) as bar:
        tuned = run(
            loaded,
            ready.train,
            tokenizer=tokenizer,
            output=output,
            options=ready.options,
            evaluations=ready.evaluations,
            answers=ready.pairs if accuracy else {},
            calibration=ready.calibration,
            merge=merge,
            about={"model": model, "revision": revision, **rows.about()},
            on_point=bar.show,
            on_step=bar.step,
        )
    if not first_process():
        return
    if as_json:
        options.print_json(dataclasses.asdict(tuned.history))
    else:
        settings = tuned.history.settings
        label = label_of(settings["method"], settings["target_sparsity"])
        options.out.print(evaluation_table(f"{model}, {label}", tuned.history).rich())
        done = f"wrote {output}" if bar.moved else f"{output}: was complete already"
        options.out.print(done, markup=False)


def _has_checkpoint(folder: Path) -> bool:
    from cats.finetuning.checkpoints import last_checkpoint

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
