"""Tasks and perplexities of the variants of a model; stored answers are not computed again."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from cats import fingerprint
from cats.errors import DataError
from cats.evaluation.answers import Answers, Score, Value, paired_difference
from cats.evaluation.tasks import evaluate_task, harness_version, task_files
from cats.evaluation.traffic import token_bytes
from cats.evaluation.variants import Variant
from cats.processes import from_first_process, rank_and_number
from cats.protocols import CausalModel, Tokenizer
from cats.results import MEAN, Perplexity, TaskScore, environment
from cats.weights.placement import input_device


def identity(model: nn.Module, tokenizer: Tokenizer) -> dict[str, Value]:
    """What answers and perplexities depend on besides the variant: a dtype and short hashes.

    Args:
        model: The dense model.
        tokenizer: Its tokenizer.
    """
    return {
        "dtype": str(cast(CausalModel, model).dtype).removeprefix("torch."),
        "weights": fingerprint.of_model(model),
        "tokenizer": fingerprint.of_tokenizer(tokenizer),
    }


def answer_tasks(
    model: nn.Module,
    tokenizer: Tokenizer,
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

    The processes of a ``torch.distributed`` group share the questions. The first one reads and
    writes the folder.

    Args:
        model: The dense model.
        tokenizer: Its tokenizer.
        variant: How the model runs.
        tasks: Names; see :func:`cats.evaluation.tasks.task_names`.
        folder: Answers are stored in it as ``<variant>/<task>.jsonl``. Stored answers of the same
            weights, tokenizer, thresholds, data and settings are used again.
        settings: Stored with the answers, such as the model's name, and :func:`identity` if the
            caller has computed it.
        limit: As for :func:`cats.evaluation.tasks.evaluate_task`, like the next three.
        seed: Seed of the draw of questions.
        batch_size: A number or ``"auto"``.
        data_dir: Folder of parquet files.
        on_task: Called with the name of a task before it runs.

    Raises:
        DataError: If the folder holds answers with other settings.
    """
    settings = dict(settings or {})
    if "weights" not in settings:
        settings |= identity(model, tokenizer)
    settings |= {**variant.settings, "harness": harness_version()}
    is_first = rank_and_number()[0] == 0
    for task in tasks:
        settings["data"] = (
            "hub" if data_dir is None else fingerprint.of_files(task_files(task, data_dir))
        )
        path = None if folder is None else folder / variant.label / f"{task}.jsonl"
        answers = None
        if path is not None and is_first and path.exists():
            answers = Answers.load(path)
            check_same(path, "answers", answers.settings, {"limit": limit, "seed": seed} | settings)
        answers = from_first_process(answers)
        if answers is None:
            on_task(task)
            with variant.on(model) as running:
                answers = evaluate_task(
                    running,
                    tokenizer,
                    task,
                    limit=limit,
                    seed=seed,
                    batch_size=batch_size,
                    data_dir=data_dir,
                    settings=dict(settings),
                )
            if path is not None and is_first:
                answers.save(path)
        yield answers


def results(variant: str, answers: Sequence[Answers], dense: Sequence[Answers]) -> list[TaskScore]:
    """One result per task and metric, and the mean of ``acc`` over the tasks.

    ``value`` is the mean over the questions; ``low`` and ``high`` are one standard error away.
    ``settings`` hold that error, the difference from the dense model and its paired error.

    Args:
        variant: Label of the variant.
        answers: Those of the variant, one per task.
        dense: Those of the dense model, for the same tasks in the same order.
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
    model: nn.Module,
    variant: Variant,
    batches: Sequence[Tensor],
    *,
    text: str,
    settings: Mapping[str, Value],
    track: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter,
    dense_losses: Sequence[float] | None = None,
) -> Perplexity:
    """Perplexity of a variant, and the bytes that one of its tokens reads.

    Args:
        model: The dense model.
        variant: How the model runs.
        batches: Token ids, ``[B, T]`` each.
        text: Name of their text, for the result.
        settings: All else that the number depends on, such as the model's name.
        track: Gives the batches one by one, for example with a progress bar.
        dense_losses: ``losses`` of the dense variant on the same batches, to compare with.
    """
    value, share = variant.measure(model, track(batches))
    result_settings: dict[str, Value] = {
        **settings,
        **variant.settings,
        "variant": variant.label,
        "text": text,
        **text_settings(batches),
        "realized_sparsity": variant.dropped,
        "mlp_share": share,
        "token_bytes": token_bytes(variant.base(model), variant.read),
    }
    if dense_losses is not None:
        difference = paired_losses(dense_losses, variant.losses)
        result_settings["loss_difference"] = difference.value
        result_settings["loss_difference_stderr"] = difference.stderr
    return Perplexity.of(
        result_settings,
        value=value,
        low=value,
        high=value,
        samples=1,
        environment=environment(str(input_device(model))),
    )


def paired_losses(first: Sequence[float], second: Sequence[float]) -> Score:
    """Mean of ``second - first`` block by block, and its standard error."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    count = len(differences)
    stderr = statistics.stdev(differences) / math.sqrt(count) if count > 1 else None
    return Score(statistics.fmean(differences), stderr, count)


def text_settings(batches: Sequence[Tensor]) -> dict[str, Value]:
    """The tokens of a text and how they are cut into blocks, on which a perplexity depends."""
    return {
        "tokens": sum(batch.numel() for batch in batches),
        "block": batches[0].shape[1],
        "text_hash": fingerprint.of_tokens(torch.cat(tuple(batches))),
    }


def mean_over_tasks(scores: Iterable[Score]) -> Score:
    """Mean of the tasks' values, each of equal weight; their questions are independent."""
    scores = list(scores)
    errors = [s.stderr for s in scores if s.stderr is not None]
    variance = sum(error**2 for error in errors) / len(scores) ** 2
    return Score(
        sum(s.value for s in scores) / len(scores),
        math.sqrt(variance) if len(errors) == len(scores) else None,
        sum(s.questions for s in scores),
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
        settings,
        quantity=metric,
        value=score.value,
        low=score.value - error,
        high=score.value + error,
        samples=score.questions,
        environment=answers.environment,
    )


def check_same(
    path: Path, what: str, stored: Mapping[str, Value], expected: Mapping[str, Value]
) -> None:
    """Raise an error if the content of a file depends on other settings than this run.

    Args:
        path: The file.
        what: What it holds, for the message.
        stored: The settings in the file.
        expected: Those of this run; further ones in ``stored`` do not matter.

    Raises:
        DataError: If a setting differs, or was not recorded.
    """
    for name, value in expected.items():
        if name not in stored:
            raise DataError(
                f"{path}: holds {what} of an older release, which did not record {name}: they may "
                "be of another model or of other data; name another folder or delete it"
            )
        if stored[name] != value:
            raise DataError(
                f"{path}: holds {what} with {name} {stored[name]!r}, wanted {value!r}; "
                "name another folder or delete it"
            )
