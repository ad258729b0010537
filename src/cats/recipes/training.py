"""From the names of data to what a fine-tuning takes: rows, a sparse model, a number of steps."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cats.apply import sparsify_
from cats.calibration import calibrate
from cats.errors import ConfigError
from cats.finetuning import FinetuneOptions, Pairs, StreamedBlocks
from cats.finetuning.data import Blocks, Examples
from cats.finetuning.run import differences, options_that_count
from cats.history import History
from cats.recipes.progress import Progress
from cats.recipes.training_data import TrainingData

_BATCH = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What :func:`cats.finetuning.finetune` takes beside the model.

    Attributes:
        train: What is learnt.
        evaluations: Name to held-out examples.
        calibration: Token ids ``[N, T]`` for thresholds; None where none are set.
        options: With the steps of the epochs, where these were given.
    """

    train: Examples
    evaluations: dict[str, Blocks | Pairs]
    calibration: Tensor | None
    options: FinetuneOptions

    @property
    def pairs(self) -> dict[str, Pairs]:
        """Those evaluations that have answers."""
        return {name: e for name, e in self.evaluations.items() if isinstance(e, Pairs)}


def read(
    tokenizer: Any,
    data: TrainingData,
    options: FinetuneOptions,
    *,
    epochs: float | None = None,
    calibrated: bool,
    progress: Progress | None = None,
) -> Prepared:
    """Read the data of a fine-tuning.

    Args:
        tokenizer: Of the model.
        data: What to read.
        options: Of the fine-tuning.
        epochs: Passes over the data, instead of the options' steps.
        calibrated: Whether thresholds will be set.
        progress: Told that data is read.

    Raises:
        ConfigError: If text for calibration has no use, or a stream has no end to count epochs by.
    """
    check_epochs(epochs)
    with (progress or Progress()).stage() as show:
        show("reading data")
        train, evaluations = data.train(tokenizer), data.evaluations(tokenizer)
        calibration = data.calibration(tokenizer, train) if calibrated else None
    if data.calibration_text and not calibrated:
        raise ConfigError("--calibration-text has no use: thresholds are there, and stay")
    return Prepared(
        train=train,
        evaluations=evaluations,
        calibration=calibration,
        options=with_epochs(options, epochs, train),
    )


def prepare_(
    model: Any,
    tokenizer: Any,
    data: TrainingData,
    options: FinetuneOptions,
    *,
    method: str | None = None,
    target_sparsity: float | None = None,
    epochs: float | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """:func:`read` the data, and make a model sparse in place where it has no thresholds yet.

    Args:
        model: Dense or sparse.
        tokenizer: Its tokenizer.
        data: What to read.
        options: Of the fine-tuning.
        method: ``"cats"``, ``"relu"`` or ``"dense"``, for a dense model; None: ``"cats"``.
        target_sparsity: Of the method ``"cats"``; None: 0.5.
        epochs: Passes over the data, instead of the options' steps.
        progress: Told of reading and of the calibration.
    """
    progress = progress or Progress()
    sparsify = not hasattr(model.config, "cats") and method != "dense"
    ready = read(
        tokenizer,
        data,
        options,
        epochs=epochs,
        progress=progress,
        calibrated=sparsify or options.recalibrate > 0,
    )
    if sparsify:
        assert ready.calibration is not None
        method = method or "cats"
        target = (0.5 if target_sparsity is None else target_sparsity) if method == "cats" else None
        batches = progress.track(ready.calibration.split(_BATCH), "calibrating")
        sparsify_(model, calibrate(model, batches, target_sparsity=target, method=method))
    return ready


def check_epochs(epochs: float | None) -> None:
    """Complain about a number of epochs that is none, before the data is read."""
    if epochs is not None and not 0 < epochs < float("inf"):
        raise ConfigError(f"--epochs must be positive, got {epochs}")


def with_epochs(options: FinetuneOptions, epochs: float | None, train: Examples) -> FinetuneOptions:
    """The options with the steps of so many passes over the data, where they were asked for."""
    if epochs is None:
        return options
    if isinstance(train, StreamedBlocks):
        raise ConfigError("a stream has no --epochs: give --steps")
    rows_a_step = options.batch_size * options.accumulate * int(os.environ.get("WORLD_SIZE", "1"))
    steps = max(1, round(epochs * (len(train) // rows_a_step)))
    return dataclasses.replace(options, steps=steps)


def changed_options(
    output: Path, options: FinetuneOptions, *, without_steps: bool = False
) -> dict[str, tuple[Any, Any]]:
    """Name of each option that the run in a folder had otherwise: what it was, and what it is now.

    Args:
        output: Folder of a run, or one where none is yet.
        options: Those of now.
        without_steps: Leave out the steps, as where epochs will decide them.
    """
    path = output / "history.jsonl"
    if not path.exists():
        return {}
    before, now = History.load(path).settings["options"], options_that_count(options)
    return {
        name: (before.get(name), now.get(name))
        for name in differences(before, now)
        if name != "steps" or not without_steps
    }
