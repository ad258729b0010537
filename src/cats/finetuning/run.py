"""Fine-tune one model: check, train or resume, save."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cats.calibration import collect
from cats.config import CatsConfig
from cats.errors import ConfigError, StorageError
from cats.finetuning import adapters
from cats.finetuning.checkpoints import last_checkpoint, step_of
from cats.finetuning.checks import check_run
from cats.finetuning.data import Blocks, Examples, Pairs
from cats.finetuning.evaluation import evaluate_answers
from cats.finetuning.options import FinetuneOptions
from cats.finetuning.processes import is_under_fsdp, rank, world_size
from cats.finetuning.settings import (
    check_same_run,
    data_settings,
    device_environment,
    settings_of,
    thresholds_of,
)
from cats.finetuning.trainer import FinetuneTrainer
from cats.history import History, Point
from cats.model import find_gated_mlps
from cats.protocols import Tokenizer

_CALIBRATION_ROWS = 4


@dataclass(frozen=True, slots=True)
class Finetuned:
    """The result of a fine-tuning.

    Attributes:
        model: The model with its adapters, in evaluation mode; with ``merge``, the merged one.
        history: Its evaluations.
        folder: Holds ``history.jsonl`` and ``adapter/`` (``model/`` after full fine-tuning), and
            ``merged/`` with ``merge``.
    """

    model: Any
    history: History
    folder: Path


@dataclass(frozen=True, slots=True)
class Recorder:
    """Saves each evaluation of a run at once.

    Attributes:
        history: What is saved; its points grow.
        path: Its file.
        on_point: Called with each evaluation.
    """

    history: History
    path: Path
    on_point: Callable[[Point], None] = lambda point: None

    def add(self, point: Point) -> None:
        self.history.points.append(point)
        self._save_and_tell()

    def add_accuracy(self, accuracy: dict[str, float]) -> None:
        """Add shares of right answers to the last point."""
        points = self.history.points
        points[-1] = dataclasses.replace(points[-1], accuracy=accuracy)
        self._save_and_tell()

    def finish(self) -> None:
        """Mark the run as complete."""
        self.history.complete = True
        self.history.save(self.path)

    def _save_and_tell(self) -> None:
        self.history.save(self.path)
        self.on_point(self.history.points[-1])


def finetune(
    model: nn.Module,
    train: Examples,
    *,
    tokenizer: Tokenizer | None,
    output: str | Path,
    options: FinetuneOptions | None = None,
    evaluations: Mapping[str, Blocks | Pairs] | None = None,
    answers: Mapping[str, Pairs] | None = None,
    calibration: Tensor | None = None,
    merge: bool = False,
    about: Mapping[str, object] | None = None,
    on_point: Callable[[Point], None] = lambda point: None,
    on_step: Callable[[int], None] = lambda step: None,
) -> Finetuned:
    """Fine-tune a sparse model, or a dense one for comparison.

    The forward pass is that of the served model: thresholds stay on, and dropped neurons get no
    gradient. If a run was stopped, the same call continues it from its last checkpoint, with the
    same result as without the stop. Several processes share the work under ``torchrun`` or
    ``accelerate launch``.

    Args:
        model: After :func:`cats.sparsify_`, or dense; not fused. It gets adapters, in place.
        train: Examples of the training.
        tokenizer: Tokenizer of the model, saved with it; or None. ``answers`` need one.
        output: Folder of the run.
        options: How to train; None is the paper's settings.
        evaluations: Name to held-out examples, whose log-perplexity is measured every
            ``options.evaluate_every`` steps.
        answers: Name to pairs whose answers are generated and compared at the end.
        calibration: Token ids ``[N, T]`` on which thresholds are calibrated again; needed with
            ``options.recalibrate``.
        merge: Whether to write ``merged/``: a checkpoint without adapters that
            :func:`cats.from_pretrained` loads.
        about: Further settings for the history, such as the name of the model.
        on_point: Called with each evaluation, in the first process.
        on_step: Called with the number of steps taken, in the first process.

    Raises:
        UnsupportedModelError: If the model is fused, has adapters already, or no gated MLP.
        ConfigError: If options contradict each other, or the folder holds another run.
        DataError: If examples are too long, too few, or of another vocabulary.
        TrainingError: If the loss becomes NaN or infinite.
        StorageError: If the folder cannot be written.
    """
    options = options or FinetuneOptions()
    evaluations, answers, folder = evaluations or {}, answers or {}, Path(output)
    if answers and tokenizer is None:
        raise ConfigError("answers are generated as text: give the tokenizer")
    check_run(
        model,
        train,
        options,
        evaluations=evaluations,
        answers=answers,
        calibration=calibration,
        merge=merge,
    )
    thresholds = thresholds_of(model)
    data = data_settings(train, evaluations, answers, calibration if options.recalibrate else None)
    settings = settings_of(model, tokenizer, options, data, about or {})
    path = folder / "history.jsonl"
    history, checkpoint = _resume(folder, path, settings)
    history.environment = history.environment or device_environment(model)
    product = folder / ("model" if options.full else "adapter")
    if history.complete:
        tuned = _load_product(model, history, product)
        if merge:
            tuned = _merge(tuned, tokenizer, folder / "merged")
        return Finetuned(tuned.eval(), history, folder)
    recorder = Recorder(history, path, on_point)
    trainer = train_model(
        model,
        train,
        options=options,
        folder=folder,
        thresholds=thresholds,
        evaluations=evaluations,
        recorder=recorder,
        checkpoint=checkpoint,
        calibration=calibration,
        on_step=on_step,
    )
    measure_answers(trainer, tokenizer, answers, recorder)
    tuned = _save(trainer, tokenizer, product)
    if merge:
        tuned = _merge(tuned, tokenizer, folder / "merged")
    if trainer.accelerator.is_main_process:
        recorder.finish()
    return Finetuned(tuned.eval(), history, folder)


def train_model(
    model: nn.Module,
    train: Examples,
    *,
    options: FinetuneOptions,
    folder: Path,
    thresholds: CatsConfig | None,
    evaluations: Mapping[str, Blocks | Pairs],
    recorder: Recorder,
    checkpoint: Path | None,
    calibration: Tensor | None,
    on_step: Callable[[int], None],
) -> FinetuneTrainer:
    """Train from the start or from ``checkpoint``, and record each evaluation.

    The other arguments are those of :func:`finetune` and :class:`FinetuneTrainer`.
    """

    def recalibrate(current: nn.Module) -> CatsConfig:
        assert thresholds is not None
        assert calibration is not None
        return _recalibrate(current, thresholds, calibration)

    trained: nn.Module
    if options.full:
        trained = model.float().requires_grad_(True)
    else:
        trained = adapters.add_adapters(model, options, same_dtype=is_under_fsdp())
    if options.gradient_checkpointing:
        _checkpoint_activations(trained)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be made ({error.strerror})") from error
    trainer = FinetuneTrainer(
        trained,
        options=options,
        train=train,
        evaluations=evaluations,
        folder=folder,
        thresholds=thresholds,
        recalibrate=recalibrate,
        resuming=checkpoint is not None,
        on_point=recorder.add,
        on_step=on_step,
    )
    if checkpoint is not None:
        trainer.load_thresholds(checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def measure_answers(
    trainer: FinetuneTrainer,
    tokenizer: Tokenizer | None,
    answers: Mapping[str, Pairs],
    recorder: Recorder,
) -> None:
    """Add the share of right answers to the last point of the history."""
    if not answers:
        return
    assert tokenizer is not None
    accuracy = {
        name: evaluate_answers(
            trainer.accelerator.unwrap_model(trainer.model),
            tokenizer,
            pairs,
            batch_size=trainer.options.answer_batch_size,
            max_new_tokens=trainer.options.max_new_tokens,
            accelerator=trainer.accelerator,
        )
        for name, pairs in answers.items()
    }
    if trainer.accelerator.is_main_process:
        recorder.add_accuracy(accuracy)


def _resume(folder: Path, path: Path, settings: dict[str, Any]) -> tuple[History, Path | None]:
    """The history so far, and the checkpoint from which the run continues; None if it starts."""
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder}: is a file, expected the folder of a run")
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder}: holds other files; name an empty folder or a new one")
        return History(settings=settings), None
    history = History.load(path)
    check_same_run(folder, history.settings, settings)
    if history.complete:
        return history, None
    checkpoint = last_checkpoint(folder)
    step = -1 if checkpoint is None else step_of(checkpoint)
    history.points = [point for point in history.points if point.step <= step]
    return history, checkpoint


def _recalibrate(model: nn.Module, thresholds: CatsConfig, calibration: Tensor) -> CatsConfig:
    """Thresholds of the same target for the current weights; processes share the text."""
    base = adapters.base_model(model)
    with adapters.dense_activations(base):
        dense = [mlp.name for mlp in find_gated_mlps(base) if mlp.name not in thresholds.tensors]
        batches = calibration.split(_CALIBRATION_ROWS)[rank() :: world_size()]
        statistics = collect(base, batches, method=thresholds.method, exclude=dense)
        statistics = statistics.all_reduce() if world_size() > 1 else statistics
    config = statistics.config(thresholds.target_sparsity)
    # the fingerprints of the base model, by which load_adapter recognises it
    return dataclasses.replace(config, fingerprints=thresholds.fingerprints)


def _save(trainer: FinetuneTrainer, tokenizer: Tokenizer | None, product: Path) -> nn.Module:
    """Write the adapter or the model, and return the model without wrappers."""
    model: nn.Module = trainer.accelerator.unwrap_model(trainer.model)
    state = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        # a run that was stopped after this line has left one
        shutil.rmtree(product, ignore_errors=True)
        if trainer.options.full:
            adapters.save_model(model, tokenizer, product, state=state)
        else:
            adapters.save_adapter(model, trainer.thresholds, product, state=state)
    trainer.accelerator.wait_for_everyone()
    return model


def _merge(model: nn.Module, tokenizer: Tokenizer | None, path: Path) -> nn.Module:
    """Write the model without adapters, and return it."""
    merged = adapters.merge(model) if hasattr(model, "merge_and_unload") else model
    if rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
        adapters.save_model(merged, tokenizer, path)
    return merged


def _load_product(model: nn.Module, history: History, product: Path) -> nn.Module:
    """The tuned model of a run that is complete already."""
    from cats.checkpoint import from_pretrained, load_dense

    if product.name != "model":
        return adapters.put_adapter(model, product)
    load = load_dense if history.settings["method"] == "dense" else from_pretrained
    tuned: nn.Module = load(product)
    return tuned.to(next(model.parameters()).device)


def _checkpoint_activations(model: nn.Module) -> None:
    kwargs = {"use_reentrant": False}
    # Any: only one of the two methods exists; the first one from transformers 5.20 on
    causal_model: Any = model
    if hasattr(model, "activation_checkpointing_enable"):
        causal_model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        causal_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
