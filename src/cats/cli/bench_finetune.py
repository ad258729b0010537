"""``cats bench finetune``: compare many runs of fine-tuning."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cats.cli import finetune_options as shared
from cats.cli import options
from cats.cli.dataclass_options import Chosen
from cats.cli.finetune_bar import StepBar
from cats.cli.running import Terminal
from cats.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from cats.finetuning.sweep import Run
    from cats.history import History, Point


@shared.data_options
@shared.tuning_options(
    {
        "Evaluation": shared.EVALUATION,
        "Training": ("steps", "batch_size", "accumulate", "warmup_steps"),
    },
    defaults={"steps": 200, "batch_size": 16, "evaluation_batch_size": 16},
)
def finetune(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the histories, one file per run.")
    ],
    *,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="dense, relu, or cats-50 for 50 %; repeatable.",
            show_default="dense, cats-50, cats-70, relu",
        ),
    ] = None,
    learning_rate: Annotated[
        list[float] | None,
        shared.training_option("--learning-rate", "--lr", help="Repeatable.", show_default="1e-5"),
    ] = None,
    distillation: Annotated[
        list[float] | None,
        shared.training_option(
            help="Share of distillation in sparse runs; repeatable.", show_default="0"
        ),
    ] = None,
    recalibrate: Annotated[
        list[int] | None,
        shared.training_option(
            help="Steps between calibrations in CATS runs; repeatable.", show_default="0"
        ),
    ] = None,
    data: Chosen,
    accuracy: shared.Accuracy = False,
    tuning: Chosen,
    epochs: shared.Epochs = None,
    bos: options.Bos = None,
    seed: options.Seed = 0,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    trust_remote_code: options.TrustRemoteCode = False,
    commit: options.Commit = None,
    as_json: options.AsJson = False,
) -> None:
    """Fine-tune with each method, learning rate and share of distillation, and compare.

    Example: [b]cats bench finetune smollm2 --lr 1e-5 --lr 1e-4 --text a.txt -o DIR[/b]

    Runs that are in the folder already are not repeated. Each run starts from the same weights and
    sees the same rows in the same order. Weights are not saved.
    """
    from cats.cli.tables import run_table
    from cats.finetuning import FinetuneOptions
    from cats.finetuning.sweep import grid, sweep
    from cats.recipes.training import check_epochs, read
    from cats.recipes.training_data import TrainingData

    runs = grid(
        method or ["dense", "cats-50", "cats-70", "relu"],
        learning_rate or [1e-5],
        distillation or [0.0],
        recalibrate or [0],
    )
    _check_grid(runs, distillation, recalibrate)
    rows = TrainingData(**data.values, seed=seed, bos=bos)
    shared.check_answers(tuning, accuracy, rows)
    chosen = FinetuneOptions(**tuning.values, seed=seed)
    check_epochs(epochs)
    options.check_output(output / "history.jsonl")
    device = options.process_device(device)
    hub = options.hub(revision, subfolder, trust_remote_code)
    loaded, tokenizer = options.load(model, dtype=dtype, device=device, dense=True, hub=hub)
    ready = read(tokenizer, rows, chosen, epochs=epochs, calibrated=True, progress=Terminal())
    assert ready.calibration is not None
    histories: dict[str, History] = {}
    with StepBar(ready.options.steps) as bar:

        def on_point(run: Run, point: Point) -> None:
            bar.name = run.name
            bar.show(point)

        for run, result in sweep(
            loaded,
            ready.train,
            runs=runs,
            tokenizer=tokenizer,
            folder=output,
            options=ready.options,
            calibration=ready.calibration,
            evaluations=ready.evaluations,
            answers=ready.pairs if accuracy else {},
            about={"model": model, "revision": revision, **rows.about()},
            commit=commit,
            on_point=on_point,
            on_step=lambda run, step: bar.step(step),
        ):
            if isinstance(result, TrainingError):
                options.err.print(f"{run.name}: {result}", style="red", markup=False)
            else:
                histories[run.name] = result
    if as_json:
        options.print_json({name: dataclasses.asdict(run) for name, run in histories.items()})
    elif histories:
        options.out.print(run_table(f"{model}, {ready.options.steps} steps", histories).rich())
    if not histories:
        raise typer.Exit(1)


def _check_grid(
    runs: list[Run], distillation: list[float] | None, recalibrate: list[int] | None
) -> None:
    """Say to which methods an option does not apply, and refuse it if it applies to none."""
    distilled = {run.method for run in runs if run.distillation}
    recalibrated = {run.method for run in runs if run.recalibrate}
    for option, values, methods, reason in (
        ("--distillation", distillation, distilled, shared.OWN_TEACHER),
        ("--recalibrate", recalibrate, recalibrated, shared.NO_TARGET),
    ):
        all_methods = dict.fromkeys(run.method for run in runs)
        without = ", ".join(method for method in all_methods if method not in methods)
        if not values or not any(values) or not without:
            continue
        if all(values) and not methods:
            raise ConfigError(f"{option} has no use for {without}: {reason}; leave it out")
        options.err.print(f"{without}: without {option}, {reason}", highlight=False)
