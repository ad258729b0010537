"""The tasks of several variants of one model, kept in a folder and resumed task by task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cats import fingerprint
from cats.errors import DataError
from cats.evaluation.answers import Answers, Score, Value, paired_difference
from cats.evaluation.tasks import evaluate_task, harness_version, task_files
from cats.evaluation.traffic import token_bytes
from cats.evaluation.variants import Variant
from cats.results import MEAN, Perplexity, TaskScore, environment
from cats.weights.placement import input_device


def identity(model: Any, tokenizer: Any) -> dict[str, Value]:
    """What answers and perplexities depend on besides the variant, as short hashes.

    Args:
        model: The dense model.
        tokenizer: Its tokenizer.
    """
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": fingerprint.of_model(model),
        "tokenizer": fingerprint.of_tokenizer(tokenizer),
    }


def answer_tasks(
    model: Any,
    tokenizer: Any,
    variant: Variant,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    settings: Mapping[str, Value] | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int | str = "auto",
    data_dir: Path | None = None,
    on_task: Callable[[str], None] = lambda task: None,
) -> Iterator[Answers]:
    """Answers of one variant, task after task.

    Args:
        model: The dense model.
        tokenizer: Its tokenizer.
        variant: How it runs.
        tasks: Names; see :func:`cats.evaluation.tasks.task_names`.
        folder: Answers are kept as ``<variant>/<task>.jsonl`` in it; what is there already, of
            the same weights, tokenizer, thresholds, data and settings, is not asked again.
        settings: Kept with the answers, such as the model's name; :func:`identity` where it is
            known already.
        limit: As for :func:`cats.evaluation.tasks.evaluate_task`, like all that follow.
        seed: Of the draw that ``limit`` makes.
        batch_size: A number or ``"auto"``.
        data_dir: Folder of parquet files.
        on_task: Called with the name of each task that is asked, before it is.

    Raises:
        DataError: If the folder holds answers with other settings.
    """
    settings = dict(settings or {})
    if "weights" not in settings:
        settings |= identity(model, tokenizer)
    settings |= {**variant.settings, "harness": harness_version()}
    for task in tasks:
        settings["data"] = (
            "hub" if data_dir is None else fingerprint.of_files(task_files(task, data_dir))
        )
        path = None if folder is None else folder / variant.label / f"{task}.jsonl"
        if path is not None and path.exists():
            answers = Answers.load(path)
            check_same(path, "answers", answers.settings, {"limit": limit, "seed": seed} | settings)
        else:
            on_task(task)
            with variant.on(model):
                answers = evaluate_task(
                    model, tokenizer, task, limit=limit, seed=seed, batch_size=batch_size,
                    data_dir=data_dir, settings=dict(settings),
                )  # fmt: skip
            if path is not None:
                answers.save(path)
        yield answers


def results(variant: str, answers: Sequence[Answers], dense: Sequence[Answers]) -> list[TaskScore]:
    """One result for each task and metric, and the mean of ``acc`` over the tasks.

    ``value`` is the mean over the questions, ``low`` and ``high`` lie one standard error beside
    it. ``settings`` hold that error, and the difference to the dense model with its paired one.

    Args:
        variant: Label of the variant.
        answers: Of the variant, one a task.
        dense: Of the dense model, the same tasks in the same order.
    """
    rows = [
        _result(variant, mine, metric, mine.score(metric), paired_difference(base, mine, metric))
        for mine, base in zip(answers, dense, strict=True)
        for metric in mine.metrics
    ]
    with_acc = [pair for pair in zip(answers, dense, strict=True) if "acc" in pair[0].metrics]
    if len(with_acc) > 1:
        score = mean_over_tasks(mine.score("acc") for mine, _ in with_acc)
        difference = mean_over_tasks(paired_difference(d, mine, "acc") for mine, d in with_acc)
        rows.append(_result(variant, with_acc[0][0], "acc", score, difference, task=MEAN))
    return rows


def measure_perplexity(
    model: Any,
    variant: Variant,
    batches: Sequence[Tensor],
    *,
    text: str,
    settings: Mapping[str, Value],
    track: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter,
) -> Perplexity:
    """Perplexity of a variant, with what a token of it reads.

    Args:
        model: The dense model.
        variant: How it runs.
        batches: Token ids ``[B, T]`` each.
        text: What the result calls their text.
        settings: What the number depends on besides, such as the model's name.
        track: Gives the batches one by one, such as with a bar.
    """
    value, share = variant.measure(model, track(batches))
    about: dict[str, Value] = {
        **settings,
        **variant.settings,
        "variant": variant.label,
        "text": text,
        **text_settings(batches),
        "realized_sparsity": variant.dropped,
        "mlp_share": share,
        "token_bytes": token_bytes(model, share),
    }
    where = environment(str(input_device(model)))
    return Perplexity.of(about, value=value, low=value, high=value, samples=1, environment=where)


def text_settings(batches: Sequence[Tensor]) -> dict[str, Value]:
    """What a perplexity depends on of its text: the tokens, and how they are cut."""
    return {
        "tokens": sum(batch.numel() for batch in batches),
        "block": batches[0].shape[1],
        "text_hash": fingerprint.of_tokens(torch.cat(tuple(batches))),
    }


def mean_over_tasks(scores: Iterable[Score]) -> Score:
    """Mean of the tasks' values, each of equal weight; their questions are independent."""
    found = list(scores)
    known = [s.stderr for s in found if s.stderr is not None]
    variance = sum(error**2 for error in known) / len(found) ** 2
    return Score(
        sum(s.value for s in found) / len(found),
        math.sqrt(variance) if len(known) == len(found) else None,
        sum(s.questions for s in found),
    )


def _result(
    variant: str,
    answers: Answers,
    metric: str,
    score: Score,
    difference: Score,
    *,
    task: str | None = None,
) -> TaskScore:
    error = score.stderr or 0.0
    settings: dict[str, Value] = {
        **answers.settings,
        "variant": variant,
        "task": task or answers.task,
        "split": "" if task else answers.split,
        "stderr": score.stderr,
        "difference": difference.value,
        "difference_stderr": difference.stderr,
    }
    return TaskScore.of(
        settings, quantity=metric, value=score.value, low=score.value - error,
        high=score.value + error, samples=score.questions, environment=answers.environment,
    )  # fmt: skip


def check_same(
    path: Path, what: str, found: Mapping[str, Value], wanted: Mapping[str, Value]
) -> None:
    """Complain where what is kept in a file depends on something else than is wanted now.

    Args:
        path: The file.
        what: What it holds, for the message.
        found: The settings that it was kept with.
        wanted: Those of this run; others in ``found`` do not matter.

    Raises:
        DataError: If one differs, or was not recorded.
    """
    for name, value in wanted.items():
        if name not in found:
            raise DataError(
                f"{path}: holds {what} of an older release, which did not record {name}: they may "
                "be of something else; name another folder or delete it"
            )
        if found[name] != value:
            raise DataError(
                f"{path}: holds {what} with {name} {found[name]!r}, wanted {value!r}; "
                "name another folder or delete it"
            )
