"""Prepare a fine-tuning: read its data, make the model sparse, count the steps."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from cats.apply import sparsify_
from cats.calibration import calibrate
from cats.errors import ConfigError
from cats.finetuning import FinetuneOptions, Pairs, StreamedBlocks
from cats.finetuning.data import Blocks, Examples
from cats.finetuning.settings import differences, options_that_count
from cats.history import History
from cats.protocols import Tokenizer
from cats.recipes.progress import Progress
from cats.recipes.training_data import TrainingData

_BATCH = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Arguments of :func:`cats.finetuning.finetune` beside the model.

    Attributes:
        train: Examples to learn.
        evaluations: Name to held-out examples.
        calibration: Token ids ``[N, T]`` for thresholds; None where none are set.
        options: The options; epochs are converted to steps.
    """

    train: Examples
    evaluations: dict[str, Blocks | Pairs]
    calibration: Tensor | None
    options: FinetuneOptions

    @property
    def pairs(self) -> dict[str, Pairs]:
        """The evaluations that have answers."""
        return {name: e for name, e in self.evaluations.items() if isinstance(e, Pairs)}


def read(
    tokenizer: Tokenizer,
    data: TrainingData,
    options: FinetuneOptions,
    *,
    epochs: float | None = None,
    calibrated: bool,
    progress: Progress | None = None,
) -> Prepared:
    """Read the data of a fine-tuning.

    Args:
        tokenizer: Tokenizer of the model.
        data: Names of the data.
        options: Options of the fine-tuning.
        epochs: Passes over the data, instead of the steps of ``options``.
        calibrated: Whether thresholds will be set.
        progress: Shows that data is read.

    Raises:
        ConfigError: If a text for calibration has no use, or epochs are to be counted in a stream.
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
    model: nn.Module,
    tokenizer: Tokenizer,
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
        model: A dense or sparse model.
        tokenizer: Its tokenizer.
        data: Names of the data.
        options: Options of the fine-tuning.
        method: ``"cats"``, ``"relu"`` or ``"dense"``, for a dense model; None: ``"cats"``.
        target_sparsity: Target of the method ``"cats"``; None: 0.5.
        epochs: Passes over the data, instead of the steps of ``options``.
        progress: Shows the reading and the calibration.
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
    """Raise ConfigError unless the number of epochs is positive or None."""
    if epochs is not None and not 0 < epochs < float("inf"):
        raise ConfigError(f"--epochs must be positive, got {epochs}")


def with_epochs(options: FinetuneOptions, epochs: float | None, train: Examples) -> FinetuneOptions:
    """The options with the steps of this number of passes over the data, unless it is None."""
    if epochs is None:
        return options
    if isinstance(train, StreamedBlocks):
        raise ConfigError("a stream has no --epochs: give --steps")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rows_per_step = options.batch_size * options.accumulate * processes
    steps = max(1, round(epochs * (len(train) // rows_per_step)))
    return dataclasses.replace(options, steps=steps)


def changed_options(
    output: Path, options: FinetuneOptions, *, without_steps: bool = False
) -> dict[str, tuple[object, object]]:
    """Options in which the run in a folder differs: name to the value then and the value now.

    Args:
        output: Folder of a run; it need not exist yet.
        options: The options now.
        without_steps: Leave out the steps, such as where epochs will decide them.
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
