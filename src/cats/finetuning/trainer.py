"""``transformers.Trainer`` with what sparse fine-tuning adds to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from cats.config import CatsConfig
from cats.errors import ConfigError, StorageError, TrainingError
from cats.finetuning.adapters import dense_teacher
from cats.finetuning.checkpoints import empty_unfinished, publish, unfinished_folder
from cats.finetuning.data import IGNORED, Blocks, Examples, Pairs, collate
from cats.finetuning.evaluation import evaluate_loss
from cats.finetuning.options import FinetuneOptions
from cats.finetuning.processes import is_launched
from cats.history import Point
from cats.model import CatsActivation

_THRESHOLDS = "thresholds.safetensors"


class FinetuneTrainer(Trainer):
    """Adds distillation, a stop at NaN, whole checkpoints, losses per token, recalibration.

    Args:
        model: A model with adapters, or one whose weights are all trained.
        options: How to train.
        train: Examples of the training.
        evaluations: Name to held-out examples.
        folder: Where checkpoints are written.
        thresholds: Those of the sparse model; None for a dense one.
        recalibrate: Gives new thresholds for the current weights; see ``options.recalibrate``.
        resuming: Whether a checkpoint is continued, without an evaluation at the start.
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
        recalibrate: Callable[[nn.Module], CatsConfig],
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

    # Any below: the signatures are those of transformers.Trainer, which passes its own objects.

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(self.accelerator.gather(loss)).all():
            raise TrainingError(
                f"the loss is NaN or infinite after {self.state.global_step} steps, so the "
                "training stops; earlier checkpoints are good. Try a lower learning rate or "
                "float32, or look for broken examples"
            )
        mask = inputs.get("attention_mask")
        tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
        in_all = self.accelerator.gather(torch.tensor([tokens], device=self.accelerator.device))
        self.state.num_input_tokens_seen += int(in_all.sum())
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The ordinary loss; with distillation, also the divergence from the dense model."""
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

    def _divergence(self, model: nn.Module, inputs: dict[str, Tensor], logits: Tensor) -> Tensor:
        """Sum of KL(dense || sparse) over the tokens of the loss."""
        with torch.no_grad(), dense_teacher(model):
            ids = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
            teacher = model(**ids, use_cache=False).logits
        learnt = inputs["labels"][:, 1:] != IGNORED
        return divergence(logits[:, :-1][learnt], teacher[:, :-1][learnt])

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure all held-out examples, record a point, and log it."""
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

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint under another name, and rename it when it is whole.

        The Trainer writes file by file under the final name, and resumes from the files that exist.
        Without the optimiser's file, it would start with a new optimiser and give no error.
        """
        self.clock.stop()
        folder, unfinished = self._folder, unfinished_folder(self._folder)
        name = f"checkpoint-{self.state.global_step}"
        if self.accelerator.is_main_process:
            empty_unfinished(folder)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(unfinished)
        try:
            super()._save_checkpoint(model, trial)
            if self.thresholds is not None and self.accelerator.is_main_process:
                self.thresholds.save(unfinished / name / _THRESHOLDS)
        except (OSError, SafetensorError, RuntimeError) as error:
            # if the disk is full, the writer of torch's archives raises RuntimeError
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            raise StorageError(f"{folder / name}: cannot be written: {error}") from error
        finally:
            self.args.output_dir = str(folder)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            publish(folder, name, keep=self.options.keep)
        self.accelerator.wait_for_everyone()
        self.clock.start(self.state.global_step)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As in the Trainer, but without a request to the hub and a pickle of the arguments."""
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

    def recalibrate(self) -> None:
        """Calibrate the thresholds again for the current weights."""
        self.clock.stop()
        self.set_thresholds(self._recalibrate(cast(nn.Module, self.model)))
        self.clock.start(self.state.global_step)

    def set_thresholds(self, config: CatsConfig) -> None:
        """Change the thresholds of the sparse MLPs in place."""
        self.thresholds = config
        model = self.accelerator.unwrap_model(self.model)
        model.config.cats = config.to_dict()
        activations = {
            name.rpartition(".")[0]: module
            for name, module in model.named_modules()
            if isinstance(module, CatsActivation)
        }
        for name, threshold in config.thresholds.items():
            # PEFT puts the names of its wrappers in front of the model's
            act = next(a for mlp, a in activations.items() if f".{mlp}".endswith(f".{name}"))
            act.threshold = threshold.to(act.threshold.device)

    def check_thresholds(self) -> None:
        """Raise ConfigError if a wrapper (FSDP, mixed precision) has rounded the thresholds."""
        for name, module in self.model_wrapped.named_modules():
            if isinstance(module, CatsActivation) and module.threshold.dtype != torch.float32:
                raise ConfigError(
                    f"{name}: the threshold was rounded to {module.threshold.dtype}: use FSDP 2 "
                    "(fsdp_version: 2), or mixed precision without buffers"
                )


class _Steps(TrainerCallback):
    """What happens between steps: the clock, the progress bar, and recalibration."""

    def __init__(self, trainer: FinetuneTrainer, on_step: Callable[[int], None]) -> None:
        self._trainer, self._on_step = trainer, on_step

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: object,
    ) -> None:
        self._trainer.check_thresholds()
        self._trainer.clock.start(state.global_step)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: object,
    ) -> None:
        # the Trainer evaluates after the last step, but logs only at multiples of logging_steps
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
    device = next(model.parameters()).device
    on_cpu = device.type == "cpu" and not (torch.cuda.is_available() and is_launched())
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
        # NaN is an error here; the filter would leave it out of the mean
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
