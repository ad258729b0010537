"""Options that ``cats finetune`` and ``cats bench finetune`` share, and their checks."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from cats.cli.dataclass_options import Chosen, option_name, options_of
from cats.errors import ConfigError
from cats.finetuning.options import FinetuneOptions
from cats.recipes.training_data import TrainingData

if TYPE_CHECKING:
    from pathlib import Path

# Why an option does not apply to some methods.
OWN_TEACHER = "a dense model would be its own teacher"
NO_TARGET = "only cats has a target sparsity to calibrate for"

# Fields whose option has another name.
NAMES = {
    "learning_rate": "--learning-rate,--lr",
    "evaluate_every": "--eval-every",
    "evaluation_batch_size": "--eval-batch-size",
    "targets": "--target",
    "bfloat16": "--bf16/--no-bf16",
}
EVALUATION = ("evaluate_every", "evaluation_batch_size", "max_new_tokens", "answer_batch_size")
_OF_ANSWERS = ("max_new_tokens", "answer_batch_size")

data_options = options_of(
    "data",
    TrainingData,
    {
        "Data": (
            *("text", "pairs", "prompt", "answer", "labels"),
            *("calibration_text", "calibration_tokens", "block"),
        ),
        "Evaluation": ("eval_text", "eval_pairs", "eval_tokens"),
    },
    shown={
        "text": "RefinedWeb, streamed",
        "calibration_tokens": "100000",
        "eval_tokens": "100000",
    },
)
tuning_options = partial(options_of, "tuning", FinetuneOptions, names=NAMES)

training_option = partial(typer.Option, rich_help_panel="Training")
Accuracy = Annotated[
    bool,
    typer.Option(
        "--accuracy",
        help="Generate answers to --eval-pairs at the end and count the right ones.",
        rich_help_panel="Evaluation",
    ),
]
Epochs = Annotated[float | None, training_option(help="Passes over the data, instead of --steps.")]


def named(fields: Collection[str]) -> str:
    """Names of the fields' options, separated by commas."""
    return ", ".join(option_name(field, NAMES) for field in fields)


def check_answers(tuning: Chosen, accuracy: bool, data: TrainingData) -> None:
    """Refuse --accuracy without pairs, and its options without --accuracy."""
    if not accuracy and (unused := [name for name in _OF_ANSWERS if name in tuning.typed]):
        raise ConfigError(
            f"without --accuracy no answers are generated: give it, or leave out {named(unused)}"
        )
    if accuracy and not data.eval_pairs:
        raise ConfigError("--accuracy needs --eval-pairs")


def check_continued(output: Path, options: FinetuneOptions, epochs: float | None) -> None:
    """Refuse, before the model is loaded, a folder that holds a run with other options.

    With ``epochs``, the steps are known and compared only after the data is read.
    """
    from cats.recipes.training import changed_options

    changed = changed_options(output, options, without_steps=epochs is not None)
    if changed:
        words = "; ".join(
            f"{named([name])} {_words(before)}, now {_words(now)}"
            for name, (before, now) in changed.items()
        )
        raise ConfigError(
            f"{output}: holds a run with {words}: give the same, name another folder, or delete it"
        )


def _words(value: object) -> str:
    """The value of an option as a user would type it."""
    if isinstance(value, list):
        return " ".join(value) or "default"
    return "default" if value is None else str(value)
