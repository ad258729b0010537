"""Fine-tune one model many times: methods, learning rates and distillation side by side."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cats.apply import densify_, sparsify_
from cats.calibration import Statistics, collect
from cats.config import CatsConfig
from cats.errors import ConfigError, TrainingError
from cats.finetuning import adapters
from cats.finetuning.data import Blocks, Examples, Pairs
from cats.finetuning.options import FinetuneOptions
from cats.finetuning.run import (
    check_same_run,
    data_settings,
    device_environment,
    measure_answers,
    settings_of,
    thresholds_of,
    train_model,
)
from cats.history import History, Point

_CALIBRATION_ROWS = 8


@dataclass(frozen=True, slots=True)
class Run:
    """One cell of a sweep.

    Attributes:
        method: ``"dense"``, ``"relu"``, or ``"cats-50"`` for a target of 50 %.
        learning_rate: Its learning rate.
        distillation: Its share of distillation.
        recalibrate: Steps between two calibrations; 0 for fixed thresholds.
    """

    method: str
    learning_rate: float
    distillation: float = 0.0
    recalibrate: int = 0

    @property
    def name(self) -> str:
        """Name of its file, without the ending."""
        parts = [self.method, f"lr{self.learning_rate:g}"]
        parts += [f"distill{self.distillation:g}"] if self.distillation else []
        parts += [f"recalibrate{self.recalibrate}"] if self.recalibrate else []
        return "-".join(parts)


def grid(
    methods: Sequence[str],
    learning_rates: Sequence[float],
    distillation: Sequence[float] = (0.0,),
    recalibrate: Sequence[int] = (0,),
) -> list[Run]:
    """All runs; distillation is for sparse models, recalibration for those with a target.

    Raises:
        ConfigError: If there is no such method.
    """
    runs = []
    for method in methods:
        parse_method(method)
        for learning_rate in learning_rates:
            for share in distillation if method != "dense" else (0.0,):
                for every in recalibrate if method.startswith("cats") else (0,):
                    runs.append(Run(method, learning_rate, share, every))
    return list(dict.fromkeys(runs))


def parse_method(text: str) -> tuple[str, float | None]:
    """Name and target sparsity: ``"cats-50"`` is ``("cats", 0.5)``.

    Raises:
        ConfigError: If there is no such method.
    """
    name, _, percent = text.partition("-")
    if text in ("dense", "relu"):
        return text, None
    if name == "cats" and percent.isdecimal() and 0 < int(percent) < 100:
        return name, int(percent) / 100
    raise ConfigError(f"no method {text!r}: expected dense, relu, or cats-50 for 50 %")


def sweep(
    model: Any,
    train: Examples,
    *,
    runs: Sequence[Run],
    tokenizer: Any,
    folder: Path,
    options: FinetuneOptions,
    calibration: Tensor,
    evaluations: Mapping[str, Blocks | Pairs],
    answers: Mapping[str, Pairs] | None = None,
    about: Mapping[str, Any] | None = None,
    commit: str | None = None,
    on_point: Callable[[Run, Point], None] = lambda run, point: None,
    on_step: Callable[[Run, int], None] = lambda run, step: None,
) -> Iterator[tuple[Run, History | TrainingError]]:
    """Run what the folder does not hold yet; give the history of each run, or why it stopped.

    Every run starts from the weights of ``model`` and sees the same rows in the same order. Only
    histories are kept: ``folder/NAME.jsonl``.

    Args:
        model: The dense model; its weights do not change.
        train: What to learn.
        runs: What to run; see :func:`grid`.
        tokenizer: Tokenizer of the model.
        folder: Where the histories are written.
        options: What the runs have in common.
        calibration: Token ids ``[N, T]`` for thresholds.
        evaluations: Name to held-out examples.
        answers: Name to pairs whose answers are compared at the end.
        about: Further settings, such as the name of the model.
        commit: Commit of the sources, if they are not a checkout that tells it.
        on_point: Called with each evaluation.
        on_step: Called with the number of steps taken.

    Raises:
        ConfigError: If the options of a run cannot be right, or the folder holds a run of the same
            name and other settings.
    """
    if options.full:
        raise ConfigError(
            "runs of a sweep start from the same weights: full fine-tuning changes them"
        )
    counted: dict[str, Statistics] = {}
    # all of them before the first run: options that cannot be right are refused at once
    chosen_of = {
        run: dataclasses.replace(
            options,
            learning_rate=run.learning_rate,
            distillation=run.distillation,
            recalibrate=run.recalibrate,
            save_every=0,
        )
        for run in runs
    }

    def apply_(method: str) -> None:
        name, target = parse_method(method)
        if name == "dense":
            densify_(model)
            return
        if name not in counted:
            counted[name] = collect(
                densify_(model), calibration.split(_CALIBRATION_ROWS), method=name
            )
        sparsify_(model, counted[name].config(target))

    # what the folder holds already, before anything is run
    there: dict[Run, History] = {}
    settings: dict[Run, dict[str, Any]] = {}
    data = data_settings(train, evaluations, answers or {}, calibration)
    calibration_hash = data["calibration"]
    for run, chosen in chosen_of.items():
        apply_(run.method)
        named = {**(about or {}), "run": run.name}
        of_run = data | {"calibration": calibration_hash if run.recalibrate else None}
        settings[run] = settings_of(model, tokenizer, chosen, of_run, named)
        path = folder / f"{run.name}.jsonl"
        if not path.exists():
            continue
        found = History.load(path)
        check_same_run(path, found.settings, settings[run])
        if found.complete:
            there[run] = found

    for run, chosen in chosen_of.items():
        if run in there:
            yield run, there[run]
            continue
        apply_(run.method)
        path = folder / f"{run.name}.jsonl"
        history = History(settings=settings[run], environment=device_environment(model, commit))
        try:
            _run(
                model, train, run=run, options=chosen, tokenizer=tokenizer, history=history,
                path=path, thresholds=thresholds_of(model), calibration=calibration,
                evaluations=evaluations, answers=answers or {}, on_point=on_point, on_step=on_step,
            )  # fmt: skip
        except TrainingError as error:
            yield run, error
            continue
        yield run, history
    densify_(model)


def _run(
    model: Any,
    train: Examples,
    *,
    run: Run,
    options: FinetuneOptions,
    tokenizer: Any,
    history: History,
    path: Path,
    thresholds: CatsConfig | None,
    calibration: Tensor,
    evaluations: Mapping[str, Blocks | Pairs],
    answers: Mapping[str, Pairs],
    on_point: Callable[[Run, Point], None],
    on_step: Callable[[Run, int], None],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer = train_model(
                model, train, options=options, folder=Path(folder), thresholds=thresholds,
                evaluations=evaluations, history=history, path=path, checkpoint=None,
                calibration=calibration, on_point=lambda point: on_point(run, point),
                on_step=lambda step: on_step(run, step),
            )  # fmt: skip
            measure_answers(
                trainer, tokenizer, answers, history, path, lambda point: on_point(run, point)
            )
        finally:
            adapters.remove_adapters_(model)
    history.complete = True
    history.save(path)
