"""The quality of a model and of its sparse form, side by side: perplexity or zero-shot tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from cats.apply import densify_
from cats.evaluation.answers import Value
from cats.evaluation.run import answer_tasks, results
from cats.evaluation.variants import Variant
from cats.metrics import perplexity, perplexity_and_sparsity
from cats.recipes.progress import Progress
from cats.results import Result
from cats.storage import replacing


@dataclass(frozen=True, kw_only=True, slots=True)
class Perplexities:
    """Perplexity of a model on one text, dense and, where it has thresholds, sparse.

    Attributes:
        dense: Without thresholds.
        sparse: With them; None where there are none.
        method: Of the thresholds.
        target_sparsity: Of the thresholds; None where the method has no target.
        realized_sparsity: Name of each sparse MLP to the share of neurons that it dropped.
    """

    dense: float
    sparse: float | None = None
    method: str | None = None
    target_sparsity: float | None = None
    realized_sparsity: dict[str, float] = field(default_factory=dict)


def compare_perplexities(
    model: Any, batches: Sequence[Tensor], *, progress: Progress | None = None
) -> Perplexities:
    """Perplexity of a model, and of its sparse form beside it.

    Args:
        model: Dense or sparse; dense afterwards.
        batches: Token ids ``[B, T]`` each.
        progress: Told of each pass over them.
    """
    progress = progress or Progress()
    found: dict[str, Any] = {}
    if hasattr(model.config, "cats"):
        thresholds = model.config.cats
        found["method"] = thresholds["method"]
        found["target_sparsity"] = thresholds["target_sparsity"]
        found["sparse"], found["realized_sparsity"] = perplexity_and_sparsity(
            model, progress.track(batches, "sparse perplexity")
        )
        densify_(model)
    found["dense"] = perplexity(model, progress.track(batches, "dense perplexity"))
    return Perplexities(**found)


def ask_tasks(
    model: Any,
    tokenizer: Any,
    variants: Iterable[Variant],
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    settings: Mapping[str, Value] | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int | str = "auto",
    data_dir: Path | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Zero-shot tasks of several variants of one model; the first is what others differ from.

    Args:
        model: The dense model.
        tokenizer: Its tokenizer.
        variants: Ways to run it, such as ``[Dense(), Sparse(config)]``.
        tasks: Names; see :func:`cats.evaluation.tasks.task_names`.
        folder: As for :func:`cats.evaluation.run.answer_tasks`, like all up to ``data_dir``.
        settings: Kept with the answers.
        limit: Questions a task.
        seed: Of their draw.
        batch_size: Questions of a forward pass, or ``"auto"``.
        data_dir: Folder of parquet files.
        progress: Told of each task, before and after.
    """
    progress = progress or Progress()
    found: list[Result] = []
    first = None
    for variant in variants:
        answers = []
        for answer in answer_tasks(
            model,
            tokenizer,
            variant,
            tasks,
            folder=folder,
            settings=settings,
            limit=limit,
            seed=seed,
            batch_size=batch_size,
            data_dir=data_dir,
            on_task=partial(_say_asking, progress, variant.label),
        ):
            answers.append(answer)
            progress.say(f"{variant.label}: {answer.task} done")
        first = first or answers
        found += results(variant.label, answers, first)
    return found


def _say_asking(progress: Progress, label: str, task: str) -> None:
    # the harness's bars say neither
    progress.say(f"{label}: asking {task} ...")


def write_results(path: Path, found: Iterable[Result]) -> None:
    """One line a result; the file is replaced as a whole."""
    with replacing(path) as temporary:
        temporary.write_text("".join(result.to_json() + "\n" for result in found))
