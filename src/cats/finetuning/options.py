"""How a model is fine-tuned; the defaults are the paper's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TypeVar

from cats.errors import ConfigError

Number = TypeVar("Number", int, float)


def _positive(default: Number) -> Number:
    least = {"least": 1} if isinstance(default, int) else {}
    return field(default=default, metadata={"positive": True, **least})


def _not_negative(default: Number) -> Number:
    return field(default=default, metadata={"positive": False, "least": 0})


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneOptions:
    """Options of one fine-tuning; see arXiv:2404.08763, section on fine-tuning.

    The options of ``cats finetune`` are made of these fields and of the words below.

    Attributes:
        steps: Optimiser steps.
        batch_size: Rows of a forward pass of one process.
        accumulate: Forward passes per step.
        learning_rate: At the start, after the warm-up; it falls linearly to 0 over the steps.
        weight_decay: Of AdamW.
        warmup_steps: Steps over which the learning rate rises from 0.
        rank: Rank of the LoRA adapters.
        alpha: Scale of the adapters: their output is multiplied by alpha / rank.
        dropout: On the input of the adapters.
        targets: Name of a layer with adapters, such as q_proj. Default: queries and values, and
            every linear layer of the gated MLPs.
        full: Train all weights, in float32, instead of adapters, whose options then have no use.
        distillation: Share of the divergence from the dense model in the loss, in [0, 1]; the rest
            is the ordinary loss. The dense model is the same weights without thresholds and
            adapters.
        recalibrate: Steps between two calibrations at the same target sparsity; 0 keeps
            them fixed.
        gradient_checkpointing: Compute activations twice instead of keeping them: less memory,
            more time.
        bfloat16: Compute in bfloat16 (autocast). Default: where the device does so fast.
        evaluate_every: Steps between two evaluations.
        evaluation_batch_size: Rows of a forward pass of an evaluation.
        max_new_tokens: Longest answer, where accuracy is measured.
        answer_batch_size: Answers that are generated at once, where accuracy is measured.
        save_every: Steps between two checkpoints; 0: none.
        keep: How many checkpoints are kept.
        seed: Seed of the adapters, the order of the data and dropout.
        report_to: Tracker of transformers.Trainer, such as tensorboard or wandb.
    """

    steps: int = _positive(500)
    batch_size: int = _positive(8)
    accumulate: int = _positive(1)
    learning_rate: float = _positive(1e-5)
    weight_decay: float = _not_negative(0.01)
    warmup_steps: int = _not_negative(0)
    rank: int = _positive(64)
    alpha: int = _positive(16)
    dropout: float = 0.1
    targets: tuple[str, ...] = ()
    full: bool = False
    distillation: float = 0.0
    recalibrate: int = _not_negative(0)
    gradient_checkpointing: bool = False
    bfloat16: bool | None = None
    evaluate_every: int = _positive(50)
    evaluation_batch_size: int = _positive(8)
    max_new_tokens: int = _positive(256)
    answer_batch_size: int = _positive(64)
    save_every: int = _not_negative(100)
    keep: int = _positive(2)
    seed: int = 0
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            positive = option.metadata.get("positive")
            if positive is True and not 0 < value < math.inf:
                raise ConfigError(f"{option.name} must be positive, got {value}")
            if positive is False and not 0 <= value < math.inf:
                raise ConfigError(f"{option.name} must not be negative, got {value}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must lie in [0, 1), got {self.dropout}")
        if not 0 <= self.distillation <= 1:
            raise ConfigError(f"distillation must lie in [0, 1], got {self.distillation}")
        if self.distillation and self.full:
            raise ConfigError(
                "distillation needs the dense model's own weights, which full fine-tuning changes: "
                "train adapters (full=False), or leave out distillation"
            )

    @property
    def log_every(self) -> int:
        """Steps between two logs: at most 10, and one falls on each evaluation and checkpoint."""
        return math.gcd(10, self.evaluate_every, self.save_every)
