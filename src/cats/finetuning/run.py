"""Fine-tune one model: check, train or resume, save."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cats import fingerprint
from cats.calibration import collect
from cats.config import CatsConfig
from cats.errors import ConfigError, DataError, StorageError, UnsupportedModelError
from cats.finetuning import adapters
from cats.finetuning.data import (
    Blocks,
    Examples,
    Pairs,
    StreamedBlocks,
    describe,
    longest,
    token_range,
)
from cats.finetuning.evaluation import evaluate_answers
from cats.finetuning.options import FinetuneOptions
from cats.finetuning.trainer import FinetuneTrainer, last_checkpoint
from cats.history import History, Point
from cats.model import CatsActivation, find_gated_mlps, is_sparse
from cats.results import environment

# Options that change neither the trained weights nor the measurements.
_FREE = ("save_every", "keep", "report_to", "gradient_checkpointing")
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


def finetune(
    model: Any,
    train: Examples,
    *,
    tokenizer: Any,
    output: str | Path,
    options: FinetuneOptions | None = None,
    evaluations: Mapping[str, Blocks | Pairs] | None = None,
    answers: Mapping[str, Pairs] | None = None,
    calibration: Tensor | None = None,
    merge: bool = False,
    about: Mapping[str, Any] | None = None,
    on_point: Callable[[Point], None] = lambda point: None,
    on_step: Callable[[int], None] = lambda step: None,
) -> Finetuned:
    """Fine-tune a sparse model, or a dense one for comparison, through its kept neurons.

    The forward pass is the one that is served: thresholds stay on, and dropped neurons get no
    gradient. If a run was stopped, the same call continues it from its last checkpoint, and it ends
    as if it had not been stopped. Several processes share the work under ``torchrun`` or
    ``accelerate launch``.

    Args:
        model: After :func:`cats.sparsify_`, or dense; not fused. It gets adapters, in place.
        train: What to learn.
        tokenizer: Tokenizer of the model, saved with it. None saves none; ``answers`` need one.
        output: Folder of the run.
        options: How to train; None takes the paper's settings.
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
    _check(model, train, options, evaluations, answers, calibration, merge)
    thresholds = thresholds_of(model)
    data = data_settings(train, evaluations, answers, calibration if options.recalibrate else None)
    settings = settings_of(model, tokenizer, options, data, about or {})
    path = folder / "history.jsonl"
    history, checkpoint = _continue(folder, path, settings)
    history.environment = history.environment or device_environment(model)
    product = folder / ("model" if options.full else "adapter")
    if history.complete:
        return _finished(model, tokenizer, history, folder, product, merge)
    trainer = train_model(
        model, train, options=options, folder=folder, thresholds=thresholds,
        evaluations=evaluations, history=history, path=path, checkpoint=checkpoint,
        calibration=calibration, on_point=on_point, on_step=on_step,
    )  # fmt: skip
    measure_answers(trainer, tokenizer, answers, history, path, on_point)
    tuned = _save(trainer, tokenizer, product)
    if merge:
        tuned = _merge(tuned, tokenizer, folder / "merged")
    if trainer.accelerator.is_main_process:
        history.complete = True
        history.save(path)
    return Finetuned(tuned.eval(), history, folder)


def train_model(
    model: Any,
    train: Examples,
    *,
    options: FinetuneOptions,
    folder: Path,
    thresholds: CatsConfig | None,
    evaluations: Mapping[str, Blocks | Pairs],
    history: History,
    path: Path,
    checkpoint: Path | None,
    calibration: Tensor | None,
    on_point: Callable[[Point], None],
    on_step: Callable[[int], None],
) -> FinetuneTrainer:
    """Train, and record each evaluation in ``history``, which is saved under ``path``."""

    def record(point: Point) -> None:
        history.points.append(point)
        history.save(path)
        on_point(point)

    def recalibrate(current: Any) -> CatsConfig:
        assert thresholds is not None
        assert calibration is not None
        return _recalibrate(current, thresholds, calibration)

    if options.full:
        trained = model.float().requires_grad_(True)
    else:
        trained = adapters.add_adapters(model, options, same_dtype=_under_fsdp())
    if options.gradient_checkpointing:
        _checkpoint_activations(trained)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be made ({error.strerror})") from error
    trainer = FinetuneTrainer(
        trained, options=options, train=train, evaluations=evaluations, folder=folder,
        thresholds=thresholds, recalibrate=recalibrate, resuming=checkpoint is not None,
        on_point=record, on_step=on_step,
    )  # fmt: skip
    if checkpoint is not None:
        trainer.load_thresholds(checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def measure_answers(
    trainer: FinetuneTrainer,
    tokenizer: Any,
    answers: Mapping[str, Pairs],
    history: History,
    path: Path,
    on_point: Callable[[Point], None],
) -> None:
    """Add the share of right answers to the last point of the history."""
    if not answers:
        return
    accuracy = {
        name: evaluate_answers(
            trainer.accelerator.unwrap_model(trainer.model), tokenizer, pairs,
            batch_size=trainer.options.answer_batch_size,
            max_new_tokens=trainer.options.max_new_tokens, accelerator=trainer.accelerator,
        )
        for name, pairs in answers.items()
    }  # fmt: skip
    if trainer.accelerator.is_main_process:
        history.points[-1] = dataclasses.replace(history.points[-1], accuracy=accuracy)
        history.save(path)
        on_point(history.points[-1])


def thresholds_of(model: nn.Module) -> CatsConfig | None:
    """The config of a sparse model, from what is applied to it; None for a dense one."""
    acts = {n: m for n, m in model.named_modules() if isinstance(m, CatsActivation)}
    if not acts:
        return None
    adapters.refuse_fused(model)
    tensors = {n.rpartition(".")[0]: {"threshold": m.threshold.cpu()} for n, m in acts.items()}
    fingerprints = {m.name: m.fingerprint() for m in find_gated_mlps(model, names=tensors)}
    config: Any = model.config
    return CatsConfig.from_dict(config.cats, tensors, fingerprints=fingerprints)


def data_settings(
    train: Examples,
    evaluations: Mapping[str, Blocks | Pairs],
    answers: Mapping[str, Pairs],
    calibration: Tensor | None,
) -> dict[str, Any]:
    """Sizes and hashes of all data of a run; for a stream, those of its first block.

    Args:
        train: What is learnt.
        evaluations: What is measured.
        answers: Whose answers are generated.
        calibration: Text on which thresholds are set again; None if they are fixed.
    """
    described = describe(train)
    if isinstance(train, StreamedBlocks):
        first = next(iter(train), None)
        described |= {
            "length": train.length,
            "first": None if first is None else fingerprint.of_tokens(first["input_ids"]),
        }
    return {
        "train": described,
        "evaluations": {name: describe(examples) for name, examples in evaluations.items()},
        "answers": {name: describe(pairs) for name, pairs in answers.items()},
        "calibration": None if calibration is None else fingerprint.of_tokens(calibration),
    }


def settings_of(
    model: Any,
    tokenizer: Any,
    options: FinetuneOptions,
    data: Mapping[str, Any],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The settings that identify a run, in the form that JSON gives back.

    Args:
        model: As it is trained, before it has adapters.
        tokenizer: Tokenizer of the model, or None.
        options: How it is trained.
        data: What :func:`data_settings` gives.
        about: Further settings, such as the name of the model.
    """
    block = getattr(model.config, "cats", None) or {"method": "dense", "target_sparsity": None}
    thresholds = thresholds_of(model)
    settings = {
        **about,
        "weights": fingerprint.of_model(model),
        "tokenizer": None if tokenizer is None else fingerprint.of_tokenizer(tokenizer),
        "method": block["method"],
        "target_sparsity": block["target_sparsity"],
        "calibration_hash": block.get("calibration_hash"),
        "thresholds": None if thresholds is None else fingerprint.of_thresholds(thresholds),
        "dtype": str(model.dtype).removeprefix("torch."),
        "processes": _world(),
        "options": options_that_count(options),
        **data,
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def options_that_count(options: FinetuneOptions) -> dict[str, Any]:
    """The options that decide the result, in the form that JSON gives back."""
    kept = {k: v for k, v in dataclasses.asdict(options).items() if k not in _FREE}
    plain: dict[str, Any] = json.loads(json.dumps(kept))
    return plain


def device_environment(model: nn.Module, commit: str | None = None) -> dict[str, Any]:
    """Device and versions of a run, for its history."""
    device = next(model.parameters()).device
    return dict(environment("cpu" if device.type == "cpu" else str(device), commit=commit))


def _check(
    model: Any,
    train: Examples,
    options: FinetuneOptions,
    evaluations: Mapping[str, Blocks | Pairs],
    answers: Mapping[str, Pairs],
    calibration: Tensor | None,
    merge: bool,
) -> None:
    """Raise before the first step for what would go wrong later."""
    if not hasattr(model, "config"):
        raise UnsupportedModelError(
            f"expected a language model of transformers, got {type(model).__name__}"
        )
    adapters.refuse_fused(model)
    if merge and options.full:
        raise ConfigError("full fine-tuning has no adapters to merge: it writes model/")
    if not options.full:
        adapters.import_peft()
    if hasattr(model, "peft_config"):
        raise UnsupportedModelError(
            "the model has adapters already: merge them first (model.merge_and_unload()), or load "
            "the model anew"
        )
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    for name in options.report_to:
        if name not in available:
            raise ConfigError(
                f"cannot report to {name!r}: install its package; "
                f"installed trackers: {', '.join(available) or 'none'}"
            )
    # plain transformers loads a sparse checkpoint dense, block and all
    sparse = is_sparse(model)
    if getattr(model.config, "cats", None) and not sparse:
        raise ConfigError(
            "the checkpoint is sparse, but its thresholds are not applied, so that it would be "
            "trained as a dense model: load it with cats.from_pretrained"
        )
    if options.distillation and not sparse:
        raise ConfigError(
            "distillation needs a sparse model: this dense one would be its own teacher; apply "
            "thresholds with cats.sparsify_, or leave out distillation"
        )
    if options.recalibrate:
        if not sparse or model.config.cats["target_sparsity"] is None:
            raise ConfigError(
                "recalibrate needs thresholds with a target sparsity, as those of CATS: apply them "
                "with cats.sparsify_, or leave out recalibrate"
            )
        if calibration is None:
            raise ConfigError("recalibrate needs calibration: token ids [N, T]")
    if _under_fsdp() and (answers or merge or options.recalibrate):
        raise ConfigError(
            "answers, merging and recalibration need whole weights, which FSDP cuts into pieces: "
            "do these in one process when the training is done"
        )
    need = options.batch_size * options.accumulate * _world()
    if not isinstance(train, StreamedBlocks) and len(train) < need:
        raise DataError(
            f"{len(train)} rows fill no step of {need}: give more text, shorter blocks, or a "
            "smaller batch"
        )
    for name, found in {"training": train, **evaluations, **answers}.items():
        if not isinstance(found, Blocks | Pairs | StreamedBlocks):
            raise DataError(f"{name}: expected Blocks, Pairs or StreamedBlocks, got {type(found)}")
    context = getattr(model.config, "max_position_embeddings", None)
    vocabulary = model.get_input_embeddings().num_embeddings
    for name, examples in {"training": train, **evaluations}.items():
        if context is not None and longest(examples) > context:
            raise DataError(
                f"{name}: a row has {longest(examples)} tokens, the model's context {context}"
            )
        if isinstance(examples, StreamedBlocks):
            first = next(iter(examples), None)
            if first is None:
                raise DataError(f"{name}: the stream fills no block")
            low, high = token_range(Blocks(first["input_ids"][None]))
        else:
            low, high = token_range(examples)
        if low < 0 or high >= vocabulary:
            raise DataError(
                f"{name}: token {low if low < 0 else high} is not in the model's vocabulary of "
                f"{vocabulary}: the tokenizer belongs to another model"
            )


def _continue(folder: Path, path: Path, settings: dict[str, Any]) -> tuple[History, Path | None]:
    """The history so far, and the checkpoint from which the run goes on, if there is one."""
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
    step = -1 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    history.points = [point for point in history.points if point.step <= step]
    return history, checkpoint


def check_same_run(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise if a history that exists is not that of this run.

    Raises:
        ConfigError: If a setting differs, or was not recorded.
    """
    if missing := [name for name in now if name not in before]:
        raise ConfigError(
            f"{path}: holds a run of an older release, which did not record "
            f"{', '.join(missing)}: it may be of something else; name another folder, or delete it"
        )
    if differing := differences(before, now):
        raise ConfigError(
            f"{path}: holds a run with other settings ({', '.join(differing)}); "
            "name another folder, or delete it"
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Names of settings that differ; a dot separates those within another, as ``options.seed``."""
    names = []
    for name in dict.fromkeys([*old, *new]):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            names += [f"{name}.{inner}" for inner in differences(a, b)]
        elif a != b:
            names.append(name)
    return names


def _recalibrate(model: Any, thresholds: CatsConfig, calibration: Tensor) -> CatsConfig:
    """Thresholds of the same target for the current weights; processes share the text."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    rank, world = int(os.environ.get("RANK", "0")), _world()
    with adapters.dense_activations(base):
        others = [mlp.name for mlp in find_gated_mlps(base) if mlp.name not in thresholds.tensors]
        batches = calibration.split(_CALIBRATION_ROWS)[rank::world]
        counted = collect(base, batches, method=thresholds.method, exclude=others)
        counted = counted.all_reduce() if world > 1 else counted
    config = counted.config(thresholds.target_sparsity)
    # the fingerprints of the base, with which loading an adapter recognises it
    return dataclasses.replace(config, fingerprints=thresholds.fingerprints)


def _save(trainer: FinetuneTrainer, tokenizer: Any, product: Path) -> Any:
    """Write the adapter or the model, and return the model without wrappers."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        # left by the same run, if it was stopped between here and its end
        shutil.rmtree(product, ignore_errors=True)
        if trainer.options.full:
            adapters.save_model(model, tokenizer, product, state=state)
        else:
            adapters.save_adapter(model, trainer.thresholds, product, state=state)
    trainer.accelerator.wait_for_everyone()
    return model


def _merge(model: Any, tokenizer: Any, path: Path) -> Any:
    merged = adapters.merge(model) if hasattr(model, "merge_and_unload") else model
    if int(os.environ.get("RANK", "0")) == 0:
        shutil.rmtree(path, ignore_errors=True)
        adapters.save_model(merged, tokenizer, path)
    return merged


def _finished(
    model: Any, tokenizer: Any, history: History, folder: Path, product: Path, merge: bool
) -> Finetuned:
    """The result of a run that is complete already."""
    from cats.checkpoint import from_pretrained, load_dense

    device = next(model.parameters()).device
    if product.name == "model":
        load = load_dense if history.settings["method"] == "dense" else from_pretrained
        tuned = load(product).to(device)
    else:
        tuned = adapters.put_adapter(model, product)
    if merge:
        tuned = _merge(tuned, tokenizer, folder / "merged")
    return Finetuned(tuned.eval(), history, folder)


def _checkpoint_activations(model: Any) -> None:
    kwargs = {"use_reentrant": False}
    # the newer name, from transformers 5.20 on
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _under_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")
