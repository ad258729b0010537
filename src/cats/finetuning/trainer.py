"""``transformers.Trainer`` with what sparse fine-tuning adds to it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from cats.config import CatsConfig
from cats.errors import ConfigError, StorageError, TrainingError
from cats.finetuning.adapters import dense_teacher
from cats.finetuning.data import IGNORED, Blocks, Examples, Pairs, collate
from cats.finetuning.evaluation import evaluate_loss
from cats.finetuning.options import FinetuneOptions
from cats.history import Point
from cats.model import CatsActivation

_THRESHOLDS = "thresholds.safetensors"
# Checkpoints are written and deleted under this name, which nothing resumes from.
_UNFINISHED = ".unfinished"


class FinetuneTrainer(Trainer):
    """Adds distillation, a stop at NaN, whole checkpoints, losses per token, recalibration.

    Args:
        model: A model with adapters, or one whose weights are all trained.
        options: How to train.
        train: What to train on.
        evaluations: Name to held-out examples.
        folder: Where checkpoints are written.
        thresholds: Those of the sparse model; None for a dense one.
        recalibrate: Gives new thresholds for the current weights; see ``options.recalibrate``.
        resuming: Whether a checkpoint is continued; then there is no evaluation at the start.
        on_point: Called in the first process with each evaluation.
        on_step: Called in the first process with the number of steps taken.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        options: FinetuneOptions,
        train: Examples,
        evaluations: Mapping[str, Blocks | Pairs],
        folder: Path,
        thresholds: CatsConfig | None,
        recalibrate: Callable[[Any], CatsConfig],
        resuming: bool,
        on_point: Callable[[Point], None],
        on_step: Callable[[int], None],
    ) -> None:
        self.options = options
        self.thresholds = thresholds
        self._evaluations = evaluations
        self._recalibrate = recalibrate
        self._on_point = on_point
        self._folder = folder
        self.clock = _Clock()
        arguments = training_arguments(model, options, folder, resuming=resuming)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=dict(evaluations),
            data_collator=collate,
            callbacks=[_Steps(self, on_step)],
        )
        self.remove_callback(PrinterCallback)

    # --- the loss

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(self.accelerator.gather(loss)).all():
            raise TrainingError(
                f"the loss is NaN or infinite after {self.state.global_step} steps, so that "
                "training stopped; the checkpoints before are good. Try a lower learning rate, "
                "float32, or look for broken examples"
            )
        mask = inputs.get("attention_mask")
        tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
        counted = self.accelerator.gather(torch.tensor([tokens], device=self.accelerator.device))
        self.state.num_input_tokens_seen += int(counted.sum())
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The ordinary loss; with distillation, mixed with the divergence from the dense model."""
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if share := self.options.distillation:
            divergence = self._divergence(model, inputs, outputs.logits)
            if num_items_in_batch is None:
                divergence = divergence / (inputs["labels"][:, 1:] != IGNORED).sum()
            else:
                # the Trainer's average over the tokens of all processes
                divergence = divergence / num_items_in_batch * self.accelerator.num_processes
            loss = (1 - share) * loss + share * divergence
        return (loss, outputs) if return_outputs else loss

    def _divergence(self, model: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        """Sum over the learnt tokens of KL(dense || sparse)."""
        with torch.no_grad(), dense_teacher(model):
            ids = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
            teacher = model(**ids, use_cache=False).logits
        learnt = inputs["labels"][:, 1:] != IGNORED
        return divergence(logits[:, :-1][learnt], teacher[:, :-1][learnt])

    # --- evaluation

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure every held-out text, record a point, and log it."""
        self.clock.stop()
        losses, shares = {}, []
        for name, examples in self._evaluations.items():
            losses[name], share = evaluate_loss(
                self.model_wrapped,
                examples,
                batch_size=self.options.evaluation_batch_size,
                accelerator=self.accelerator,
            )
            shares += [] if share is None else [share]
        point = Point(
            step=self.state.global_step,
            tokens=self.state.num_input_tokens_seen,
            train_loss=self._train_loss(),
            learning_rate=self._last_logged("learning_rate"),
            losses=losses,
            sparsity=sum(shares) / len(shares) if shares else None,
            seconds_per_step=self.clock.take(self.state.global_step),
        )
        metrics = {f"eval_{name}_loss": loss for name, loss in losses.items()}
        if point.sparsity is not None:
            metrics["eval_sparsity"] = point.sparsity
        self.log(metrics)
        if self.accelerator.is_main_process:
            self._on_point(point)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self.clock.start(self.state.global_step)
        return metrics

    def _train_loss(self) -> float | None:
        """Mean over the steps since the last evaluation; a log is the mean since the last log."""
        logs: list[tuple[int, float]] = []
        before = 0
        for entry in reversed(self.state.log_history):
            if any(key.startswith("eval_") for key in entry):
                before = int(entry["step"])
                break
            logs += [(int(entry["step"]), entry["loss"])] if "loss" in entry else []
        total, steps = 0.0, 0
        for step, loss in reversed(logs):
            total += loss * (step - before)
            steps += step - before
            before = step
        return total / steps if steps else None

    def _last_logged(self, key: str) -> float | None:
        return next((e[key] for e in reversed(self.state.log_history) if key in e), None)

    # --- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint under another name, and rename it when it is whole.

        The Trainer writes file by file under the final name, and resumes from what it finds. If the
        optimiser's file were missing, it would start with a fresh optimiser and say nothing.
        """
        self.clock.stop()
        folder = self._folder
        unfinished = folder / _UNFINISHED
        name = f"checkpoint-{self.state.global_step}"
        if self.accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(unfinished)
        try:
            super()._save_checkpoint(model, trial)
            if self.thresholds is not None and self.accelerator.is_main_process:
                self.thresholds.save(unfinished / name / _THRESHOLDS)
        except (OSError, SafetensorError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError of its archive's writer
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            raise StorageError(f"{folder / name}: cannot be written: {error}") from error
        finally:
            self.args.output_dir = str(folder)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            _flush(unfinished / name)
            if (folder / name).exists():
                (folder / name).rename(unfinished / "replaced")
            (unfinished / name).rename(folder / name)
            for old in checkpoints(folder)[: -self.options.keep]:
                # renamed first, so that a checkpoint which is half deleted is not found
                old.rename(unfinished / old.name)
            shutil.rmtree(unfinished)
        self.accelerator.wait_for_everyone()
        self.clock.start(self.state.global_step)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As in the Trainer, but without asking the hub, and without a pickle of the arguments."""
        assert output_dir is not None
        if self.args.should_save:
            kwargs = {} if state_dict is None else {"state_dict": state_dict}
            if hasattr(self.model, "peft_config"):
                kwargs["save_embedding_layers"] = False
            self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, **kwargs)

    def load_thresholds(self, checkpoint: Path) -> None:
        """Load the thresholds of a checkpoint, which may have been recalibrated."""
        if self.thresholds is not None:
            self.set_thresholds(CatsConfig.load(checkpoint / _THRESHOLDS))

    # --- recalibration

    def recalibrate(self) -> None:
        """Calibrate the thresholds again for the current weights."""
        self.clock.stop()
        self.set_thresholds(self._recalibrate(self.model))
        self.clock.start(self.state.global_step)

    def set_thresholds(self, config: CatsConfig) -> None:
        """Change the thresholds of the sparse MLPs in place."""
        self.thresholds = config
        model = self.accelerator.unwrap_model(self.model)
        model.config.cats = config.to_dict()
        found = {
            name.rpartition(".")[0]: module
            for name, module in model.named_modules()
            if isinstance(module, CatsActivation)
        }
        for name, threshold in config.thresholds.items():
            # PEFT puts the names of its wrappers in front of the model's
            act = next(act for mlp, act in found.items() if f".{mlp}".endswith(f".{name}"))
            act.threshold = threshold.to(act.threshold.device)

    def check_thresholds(self) -> None:
        """Raise ConfigError if a wrapper has rounded the thresholds."""
        for name, module in self.model_wrapped.named_modules():
            if isinstance(module, CatsActivation) and module.threshold.dtype != torch.float32:
                raise ConfigError(
                    f"{name}: the threshold was rounded to {module.threshold.dtype}: use FSDP 2 "
                    "(fsdp_version: 2), or mixed precision without buffers"
                )


class _Steps(TrainerCallback):
    """Between steps: the clock, the bar, and recalibration."""

    def __init__(self, trainer: FinetuneTrainer, on_step: Callable[[int], None]) -> None:
        self._trainer, self._on_step = trainer, on_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.check_thresholds()
        self._trainer.clock.start(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # the Trainer evaluates after the last step, but logs at multiples only
        control.should_log = control.should_log or state.global_step >= state.max_steps
        every = self._trainer.options.recalibrate
        if every and state.global_step % every == 0:
            self._trainer.recalibrate()
        if state.is_world_process_zero:
            self._on_step(state.global_step)


class _Clock:
    """Seconds of training, without evaluations and checkpoints."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._first: int | None = None
        self._seconds = 0.0

    def start(self, step: int) -> None:
        self._first = step if self._first is None else self._first
        self._since = time.perf_counter()

    def stop(self) -> None:
        if self._since is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._seconds += time.perf_counter() - self._since
        self._since = None

    def take(self, step: int) -> float | None:
        """Mean seconds per step since the last call."""
        steps = 0 if self._first is None else step - self._first
        mean = self._seconds / steps if steps else None
        self._seconds, self._first = 0.0, step
        return mean


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over tokens of KL(teacher || student), float32; logits are ``[N, V]``."""
    return F.kl_div(
        F.log_softmax(student.float(), -1),
        F.log_softmax(teacher.float(), -1),
        log_target=True,
        reduction="sum",
    )


def training_arguments(
    model: nn.Module, options: FinetuneOptions, folder: Path, *, resuming: bool
) -> TrainingArguments:
    """The Trainer's own arguments."""
    device = next(model.parameters()).device
    on_cpu = device.type == "cpu" and not (torch.cuda.is_available() and _launched())
    bfloat16 = options.bfloat16
    if bfloat16 is None:
        bfloat16 = not on_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup_steps=options.warmup_steps,
        lr_scheduler_type="linear",
        bf16=bfloat16,
        use_cpu=on_cpu,
        seed=options.seed,
        data_seed=options.seed,
        dataloader_drop_last=True,
        eval_strategy="steps",
        eval_steps=options.evaluate_every,
        eval_on_start=not resuming,
        logging_strategy="steps",
        logging_steps=options.log_every,
        # NaN is an error here, not something to be averaged away
        logging_nan_inf_filter=False,
        save_strategy="steps" if options.save_every else "no",
        save_steps=options.save_every or options.steps,
        remove_unused_columns=False,
        report_to=list(options.report_to) or "none",
        disable_tqdm=True,
        log_level="error",
        ddp_find_unused_parameters=False,
    )
    # without a launcher one process uses one GPU: DataParallel would replicate hooks and adapters
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a folder, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return next(reversed(checkpoints(folder)), None)


def _launched() -> bool:
    return "LOCAL_RANK" in os.environ


def _flush(folder: Path) -> None:
    """Wait until the disk has the files: a rename must not overtake what it names."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
