"""The quality of a model and of its sparse form, side by side: perplexity or zero-shot tasks.

Under torchrun all processes call these functions with the same model and text. They share the
batches and questions, and all get the numbers of one process; the first one writes the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from cats.apply import densify_
from cats.evaluation.answers import Value
from cats.evaluation.run import answer_tasks, check_same, measure_perplexity, text_settings
from cats.evaluation.run import results as results_of
from cats.evaluation.variants import Variant
from cats.metrics import perplexity, perplexity_and_sparsity
from cats.processes import rank_and_number
from cats.protocols import Tokenizer
from cats.recipes.progress import Progress
from cats.results import Perplexity, Result, TaskScore, read_results
from cats.storage import replacing


@dataclass(frozen=True, kw_only=True, slots=True)
class Perplexities:
    """Perplexity of a model on one text, dense and, where it has thresholds, sparse.

    Attributes:
        dense: Perplexity without thresholds.
        sparse: Perplexity with thresholds; None for a dense model.
        method: Method of the thresholds.
        target_sparsity: Target of the thresholds; None where the method has no such target.
        target_bytes: Their target as a share of bytes, or None.
        realized_sparsity: Name of each sparse MLP to the share of neurons that it dropped.
    """

    dense: float
    sparse: float | None = None
    method: str | None = None
    target_sparsity: float | None = None
    target_bytes: float | None = None
    realized_sparsity: dict[str, float] = field(default_factory=dict)


def compare_perplexities(
    model: nn.Module, batches: Sequence[Tensor], *, progress: Progress | None = None
) -> Perplexities:
    """Perplexity of a model, dense and, if it has thresholds, sparse.

    Args:
        model: A dense or sparse model; it is dense afterwards.
        batches: Token ids ``[B, T]`` each.
        progress: Shows each pass over the batches.
    """
    progress = progress or Progress()
    block = getattr(model.config, "cats", None)
    if block is None:
        dense = perplexity(model, progress.track(batches, "dense perplexity"), share=True)
        return Perplexities(dense=dense)
    sparse, realized = perplexity_and_sparsity(
        model, progress.track(batches, "sparse perplexity"), share=True
    )
    densify_(model)
    return Perplexities(
        dense=perplexity(model, progress.track(batches, "dense perplexity"), share=True),
        sparse=sparse,
        method=block["method"],
        target_sparsity=block["target_sparsity"],
        target_bytes=block.get("target_bytes"),
        realized_sparsity=realized,
    )


def measure_perplexities(
    model: nn.Module,
    variants: Iterable[Variant],
    batches: Sequence[Tensor],
    *,
    text: str,
    settings: Mapping[str, Value],
    folder: Path | None = None,
    progress: Progress | None = None,
) -> list[Perplexity]:
    """Perplexity of several variants of one model, all compared block by block with the first.

    Args:
        model: The dense model.
        variants: Ways to run it; the first is :class:`cats.evaluation.variants.Dense`.
        batches: Token ids ``[B, T]`` each.
        text: Name of their text.
        settings: The model's name, and :func:`cats.evaluation.run.identity`.
        folder: The records are written into it, one file per variant and text.
        progress: Shows each pass over the batches.

    Raises:
        DataError: If the folder holds a perplexity of the same name of another model or text.
    """
    progress = progress or Progress()
    variants, paths = list(variants), dict[str, Path]()
    if folder is not None:
        for variant in variants:
            path = paths[variant.label] = _result_path(folder, variant.label, text)
            expected = {**settings, **variant.settings, **text_settings(batches)}
            # before any is measured, which takes long
            for stored in read_results(path) if path.exists() else []:
                check_same(path, "results", stored.settings, expected)
    records: list[Perplexity] = []
    dense_losses = None
    for variant in variants:
        record = measure_perplexity(
            model,
            variant,
            batches,
            text=text,
            settings=settings,
            track=partial(progress.track, text=f"{variant.label} perplexity"),
            dense_losses=dense_losses,
        )
        dense_losses = dense_losses or variant.losses
        if variant.label in paths and rank_and_number()[0] == 0:
            write_results(paths[variant.label], [record])
        records.append(record)
    return records


def _result_path(folder: Path, label: str, text: str) -> Path:
    name = f"{label}-{text}".replace("/", "-").replace(" ", "-").replace(",", "")
    # file systems take 255 bytes, and many texts have a long name together
    if len(name.encode()) > 200:
        name = f"{name[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return folder / "perplexity" / f"{name}.jsonl"


def ask_tasks(
    model: nn.Module,
    tokenizer: Tokenizer,
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
) -> list[TaskScore]:
    """Zero-shot tasks of several variants of one model, all compared with the first variant.

    Args:
        model: The dense model.
        tokenizer: Its tokenizer.
        variants: Ways to run it, such as ``[Dense(), Sparse(config)]``.
        tasks: Names; see :func:`cats.evaluation.tasks.task_names`.
        folder: Folder for the answers; a run continues from it.
        settings: Saved with the answers.
        limit: Questions per task.
        seed: Seed of the draw of questions.
        batch_size: Questions per forward pass, or ``"auto"``.
        data_dir: Folder of parquet files.
        progress: Shows each task, before and after.
    """
    progress = progress or Progress()
    scores: list[TaskScore] = []
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
        scores += results_of(variant.label, answers, first)
    return scores


def _say_asking(progress: Progress, label: str, task: str) -> None:
    # the bars of the harness name neither the variant nor the task
    progress.say(f"{label}: asking {task} ...")


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Write one line per result; an older file of that name is replaced."""
    with replacing(path) as temporary:
        temporary.write_text("".join(result.to_json() + "\n" for result in results))
