"""Fine-tune one model many times: methods, learning rates and distillation side by side."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cats.apply import densify_, sparsify_
from cats.calibration import Statistics, collect
from cats.errors import ConfigError, TrainingError
from cats.finetuning import adapters
from cats.finetuning.data import Blocks, Examples, Pairs
from cats.finetuning.options import FinetuneOptions
from cats.finetuning.run import Recorder, measure_answers, train_model
from cats.finetuning.settings import (
    check_same_run,
    data_settings,
    device_environment,
    settings_of,
    thresholds_of,
)
from cats.history import History, Point
from cats.protocols import Tokenizer

_CALIBRATION_ROWS = 8


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a sweep.

    Attributes:
        method: ``"dense"``, ``"relu"``, or ``"cats-50"`` for a target of 50 %.
        learning_rate: As in :class:`FinetuneOptions`.
        distillation: Share of distillation in the loss.
        recalibrate: Steps between two calibrations; 0 for fixed thresholds.
    """

    method: str
    learning_rate: float
    distillation: float = 0.0
    recalibrate: int = 0

    @property
    def name(self) -> str:
        """Name of its file, without the suffix."""
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
    """All combinations; distillation needs a sparse model, recalibration a target sparsity.

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
    model: nn.Module,
    train: Examples,
    *,
    runs: Sequence[Run],
    tokenizer: Tokenizer,
    folder: Path,
    options: FinetuneOptions,
    calibration: Tensor,
    evaluations: Mapping[str, Blocks | Pairs],
    answers: Mapping[str, Pairs] | None = None,
    about: Mapping[str, object] | None = None,
    commit: str | None = None,
    on_point: Callable[[Run, Point], None] = lambda run, point: None,
    on_step: Callable[[Run, int], None] = lambda run, step: None,
) -> Iterator[tuple[Run, History | TrainingError]]:
    """Do the runs that the folder does not hold yet; yield each run's history, or its error.

    Every run starts from the weights of ``model`` and trains on the same rows in the same order.
    Only histories are stored: ``folder/NAME.jsonl``.

    Args:
        model: The dense model; its weights do not change.
        train: Examples of the training.
        runs: See :func:`grid`.
        tokenizer: Tokenizer of the model.
        folder: Where the histories are written.
        options: The options that all runs share.
        calibration: Token ids ``[N, T]`` for thresholds.
        evaluations: Name to held-out examples.
        answers: Name to pairs whose answers are compared at the end.
        about: Further settings, such as the name of the model.
        commit: Commit of the sources, if they are not in a git checkout.
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
    statistics: dict[str, Statistics] = {}
    # made before the first run: options that cannot be right are refused at once
    options_of = {
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
        if name not in statistics:
            batches = calibration.split(_CALIBRATION_ROWS)
            statistics[name] = collect(densify_(model), batches, method=name)
        sparsify_(model, statistics[name].config(target))

    # all histories of the folder are read before the first run
    complete: dict[Run, History] = {}
    settings: dict[Run, dict[str, Any]] = {}
    data = data_settings(train, evaluations, answers or {}, calibration)
    for run, run_options in options_of.items():
        apply_(run.method)
        run_data = data | {"calibration": data["calibration"] if run.recalibrate else None}
        run_about = {**(about or {}), "run": run.name}
        settings[run] = settings_of(model, tokenizer, run_options, run_data, run_about)
        path = folder / f"{run.name}.jsonl"
        if not path.exists():
            continue
        stored = History.load(path)
        check_same_run(path, stored.settings, settings[run])
        if stored.complete:
            complete[run] = stored

    for run, run_options in options_of.items():
        if run in complete:
            yield run, complete[run]
            continue
        apply_(run.method)
        history = History(settings=settings[run], environment=device_environment(model, commit))
        recorder = Recorder(history, folder / f"{run.name}.jsonl", partial(on_point, run))
        try:
            with tempfile.TemporaryDirectory() as trainer_folder, _adapters_removed(model):
                trainer = train_model(
                    model,
                    train,
                    options=run_options,
                    folder=Path(trainer_folder),
                    thresholds=thresholds_of(model),
                    evaluations=evaluations,
                    recorder=recorder,
                    checkpoint=None,
                    calibration=calibration,
                    on_step=partial(on_step, run),
                )
                measure_answers(trainer, tokenizer, answers or {}, recorder)
        except TrainingError as error:
            yield run, error
            continue
        recorder.finish()
        yield run, history
    densify_(model)


@contextmanager
def _adapters_removed(model: nn.Module) -> Iterator[None]:
    """After the block, the model has no adapters."""
    try:
        yield
    finally:
        adapters.remove_adapters_(model)
