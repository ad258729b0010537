"""Options that ``cats finetune`` and ``cats bench finetune`` share, and what they turn into."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cats.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from cats.finetuning import FinetuneOptions
    from cats.finetuning.data import Examples

# Why some methods go without an option.
OWN_TEACHER = "a dense model would be its own teacher"
NO_TARGET = "only cats has a target sparsity to calibrate for"

# Fields of FinetuneOptions whose option has another name.
_OPTIONS = {
    "evaluate_every": "--eval-every",
    "evaluation_batch_size": "--eval-batch-size",
    "targets": "--target",
    "bfloat16": "--bf16",
}

# Options by their section of the help.
data_option = partial(typer.Option, rich_help_panel="Data")
evaluation_option = partial(typer.Option, rich_help_panel="Evaluation")
training_option = partial(typer.Option, rich_help_panel="Training")

Text = Annotated[
    list[str] | None,
    data_option(
        "--text",
        help="Text to learn: .txt, .jsonl (both .gz too), .parquet, a part such as "
        r"c4.txt.gz\[:50%], or a Hugging Face id NAME:CONFIG:SPLIT; repeatable.",
        show_default="RefinedWeb, streamed",
    ),
]
PairSources = Annotated[
    list[str] | None,
    data_option(
        "--pairs", help="Prompts and answers to learn: .jsonl, .parquet or an id; repeatable."
    ),
]
Prompt = Annotated[
    str, data_option(help=r"How a row of pairs becomes a prompt, such as {passage}\n{question}?")
]
Answer = Annotated[str, data_option(help="How it becomes an answer.")]
Labels = Annotated[
    str | None, data_option(help="Names of a numbered answer by commas, such as no,yes.")
]
CalibrationText = Annotated[
    list[str] | None,
    data_option("--calibration-text", help="For thresholds. Default: what is learnt; repeatable."),
]
CalibrationTokens = Annotated[
    int | None, data_option(min=1, help="Calibrate on at most so many.", show_default="100000")
]
Block = Annotated[int, data_option(min=2, help="Tokens a block, or of a pair.")]

EvalText = Annotated[
    list[str] | None,
    evaluation_option("--eval-text", help="NAME=TEXT, measured while training; repeatable."),
]
EvalPairs = Annotated[
    list[str] | None,
    evaluation_option("--eval-pairs", help="NAME=PAIRS, measured while training; repeatable."),
]
EvalTokens = Annotated[
    int | None,
    evaluation_option(min=2, help="Tokens of each --eval-text, at most.", show_default="100000"),
]
EvalEvery = Annotated[
    int, evaluation_option("--eval-every", min=1, help="Steps between evaluations.")
]
EvalBatchSize = Annotated[
    int,
    evaluation_option("--eval-batch-size", min=1, help="Rows a forward pass of an evaluation."),
]
Accuracy = Annotated[
    bool,
    evaluation_option(
        "--accuracy",
        help="Generate answers to --eval-pairs at the end and count the right ones.",
    ),
]
MaxNewTokens = Annotated[
    int | None,
    evaluation_option(min=1, help="Longest answer, with --accuracy.", show_default="256"),
]
AnswerBatchSize = Annotated[
    int | None,
    evaluation_option(min=1, help="Answers generated at once, with --accuracy.", show_default="64"),
]

Steps = Annotated[int, training_option(min=1, help="Optimiser steps.")]
Epochs = Annotated[
    float | None, training_option(help="Passes over the data, in the place of --steps.")
]
BatchSize = Annotated[int, training_option(min=1, help="Rows a forward pass of one process.")]
Accumulate = Annotated[int, training_option(min=1, help="Forward passes a step.")]
Warmup = Annotated[int, training_option("--warmup-steps", min=0, help="Steps of warm-up.")]


def given(**values: Any) -> dict[str, Any]:
    """The options that were given: those without a value were not."""
    return {name: value for name, value in values.items() if value is not None}


def named(options: dict[str, Any]) -> str:
    """Options as they are typed, by commas."""
    return ", ".join("--" + name.replace("_", "-") for name in options)


def answer_options(
    accuracy: bool,
    eval_pairs: list[str] | None,
    max_new_tokens: int | None,
    answer_batch_size: int | None,
) -> dict[str, Any]:
    """What was given of the options of --accuracy."""
    found = given(max_new_tokens=max_new_tokens, answer_batch_size=answer_batch_size)
    if found and not accuracy:
        raise ConfigError(
            f"without --accuracy no answers are generated: give it, or leave out {named(found)}"
        )
    if accuracy and not eval_pairs:
        raise ConfigError("--accuracy needs --eval-pairs")
    return found


def check_epochs(epochs: float | None) -> None:
    """Complain about a number of epochs that is none, before the data is read."""
    if epochs is not None and not 0 < epochs < float("inf"):
        raise ConfigError(f"--epochs must be positive, got {epochs}")


def check_continued(output: Path, options: FinetuneOptions, epochs: float | None) -> None:
    """Complain, before the model is loaded, where the folder holds a run with other options.

    Steps that epochs decide are compared when the data is there, as all else is.
    """
    from cats.finetuning.run import differences, options_that_count
    from cats.history import History

    path = output / "history.jsonl"
    if not path.exists():
        return
    before, now = History.load(path).settings["options"], options_that_count(options)
    changed = [
        f"{_option(name)} {_words(before.get(name))}, now {_words(now.get(name))}"
        for name in differences(before, now)
        if name != "steps" or epochs is None
    ]
    if changed:
        raise ConfigError(
            f"{output}: holds a run with {'; '.join(changed)}: give the same, "
            "name another folder, or delete it"
        )


def _option(field: str) -> str:
    """The option of a field of FinetuneOptions."""
    return _OPTIONS.get(field) or named({field: None})


def _words(value: Any) -> str:
    """The value of an option as it is typed."""
    if isinstance(value, list):
        return " ".join(value) or "default"
    return "default" if value is None else str(value)


def with_epochs(options: FinetuneOptions, epochs: float | None, train: Examples) -> FinetuneOptions:
    """The options with the steps of so many passes over the data, where they were asked for."""
    from cats.finetuning import StreamedBlocks

    if epochs is None:
        return options
    if isinstance(train, StreamedBlocks):
        raise ConfigError("a stream has no --epochs: give --steps")
    rows_a_step = options.batch_size * options.accumulate * int(os.environ.get("WORLD_SIZE", "1"))
    steps = max(1, round(epochs * (len(train) // rows_a_step)))
    return dataclasses.replace(options, steps=steps)
