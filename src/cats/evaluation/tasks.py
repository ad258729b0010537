"""Zero-shot tasks: EleutherAI's lm-evaluation-harness on a model in memory."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import chain, groupby
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from cats.errors import ConfigError, DataError, StorageError
from cats.evaluation.answers import Answers, Question, Value
from cats.processes import in_order, rank_and_number
from cats.protocols import Tokenizer
from cats.results import environment
from cats.weights.placement import input_device

# The eight tasks of the paper, in its order.
PAPER8 = (
    "openbookqa",
    "arc_easy",
    "winogrande",
    "hellaswag",
    "arc_challenge",
    "piqa",
    "boolq",
    "sciq",
)
# On a CPU the harness's search for the largest batch takes longer than it saves.
_CPU_BATCH = 16
_SPLITS = ("training_split", "validation_split", "test_split")


def task_names(names: str) -> list[str]:
    """Names of tasks or groups, separated by commas; ``paper8`` means the paper's eight.

    Raises:
        ConfigError: If there is no such name, if it is a task without questions, or if the
            harness is not installed.
    """
    expanded = [
        task
        for name in (part.strip() for part in names.split(","))
        for task in (PAPER8 if name == "paper8" else (name,))
    ]
    known = set(task_manager().all_tasks)
    if unknown := [name for name in expanded if name not in known]:
        raise ConfigError(f"no task {unknown[0]!r}; cats lm-eval ls tasks shows them all")
    for name in expanded:
        if _definition(name).get("output_type") == "loglikelihood_rolling":
            raise ConfigError(
                f"{name} asks no questions, it is the perplexity of a text: cats evaluate --text "
                "and cats reproduce --eval-text measure that, cats lm-eval runs this task"
            )
    return list(dict.fromkeys(expanded))


def check_data(tasks: Iterable[str], data_dir: Path) -> None:
    """Raise an error for a task with missing files, before the first task runs.

    Args:
        tasks: Names that the harness knows.
        data_dir: As for :func:`evaluate_task`.

    Raises:
        ConfigError: If a name is that of a group.
        StorageError: If ``data_dir`` does not have the data of a task.
    """
    for task in tasks:
        task_files(task, data_dir)


def evaluate_task(
    model: nn.Module,
    tokenizer: Tokenizer,
    task: str,
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int | str = "auto",
    data_dir: Path | None = None,
    settings: Mapping[str, Value] | None = None,
) -> Answers:
    """Ask a model the questions of one task, or of one group of tasks.

    The prompts, the number of examples in them and the metrics are those of the harness. The
    processes of a ``torch.distributed`` group share the questions, and all get all answers.

    Args:
        model: A Hugging Face causal model, dense or sparse.
        tokenizer: Its tokenizer.
        task: A name that the harness knows.
        limit: Largest number of questions per task, drawn at random: the first ones of HellaSwag
            come from one source.
        seed: Seed of that draw.
        batch_size: A number, or ``"auto"``: as large as the GPU holds, 16 on a CPU.
        data_dir: Folder with ``<task>/<split>.parquet``, the splits named as in the task's own
            data set, such as ``validation``, and with its columns. Without it the harness
            downloads that data set.
        settings: Stored with the answers.

    Raises:
        ConfigError: If the harness is not installed.
        StorageError: If ``data_dir`` does not have the task's data.
        DataError: If the data does not have the form that the task expects.
    """
    lm_eval = _harness()
    with _quiet():
        from lm_eval.models.huggingface import HFLM

        tasks = _load(task, data_dir)
        _seed(tasks)
        device = input_device(model)
        if batch_size == "auto" and device.type == "cpu":
            batch_size = _CPU_BATCH
        model_type = _sharing(HFLM) if rank_and_number()[1] > 1 else HFLM
        harness_model = model_type(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        # not simple_evaluate, which spends seconds on a description of the machine
        result = lm_eval.evaluate(
            harness_model,
            {"tasks": tasks},
            samples=None if limit is None else _draw(tasks, limit, seed),
            # standard errors are computed from the answers
            bootstrap_iters=0,
        )
    questions = [question for name in tasks for question in read_questions(name, result)]
    splits = {t.config.test_split or t.config.validation_split for t in tasks.values()}
    return Answers(
        task=task,
        split=", ".join(sorted(map(str, splits))),
        settings={"limit": limit, "seed": seed, **(settings or {})},
        environment=environment(str(device)) | {"version_lm_eval": harness_version()},
        questions=questions,
    )


def _sharing(model_type: Any) -> Any:
    """A model type of the harness whose requests the processes share, question by question.

    The harness would give each process other questions, and so draw other examples for them.
    """

    class Sharing(model_type):  # type: ignore[misc]
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return _ask_together(super().loglikelihood, requests, disable_tqdm)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return _ask_together(super().generate_until, requests, disable_tqdm)

    return Sharing


def _ask_together(ask: Callable[..., list[Any]], requests: list[Any], quiet: bool) -> list[Any]:
    rank, processes = rank_and_number()
    by_question = groupby(requests, key=lambda request: (request.task_name, request.doc_id))
    own = [list(group) for _, group in by_question][rank::processes]
    # the harness fails on no request
    given = ask([*chain.from_iterable(own)], disable_tqdm=quiet or rank > 0) if own else []
    answers = iter(given)
    parts = [[next(answers) for _ in group] for group in own]
    return [*chain.from_iterable(in_order(parts))]


def harness_version() -> str:
    """The release of the harness, which defines tasks and prompts.

    Raises:
        ConfigError: If it is not installed.
    """
    version: str = _harness().__version__
    return version


def _harness() -> ModuleType:
    try:
        import lm_eval
    except ImportError as error:
        raise ConfigError("tasks need the harness: pip install 'cats-llm[eval]'") from error
    harness: ModuleType = lm_eval
    return harness


@cache
def task_manager() -> Any:
    """The index of all tasks; reading their definitions takes seconds."""
    _harness()
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load(name: str, data_dir: Path | None) -> dict[str, Any]:
    """Name of each task of a task or group to the harness's object for it."""
    manager = task_manager()
    spec = name if data_dir is None else _offline(name, data_dir)
    try:
        tasks: dict[str, Any] = manager.load([spec])["tasks"]
    except (OSError, ValueError, KeyError) as error:
        source = "the network" if data_dir is None else str(data_dir / name)
        raise DataError(
            f"{name}: its data cannot be loaded from {source} ({type(error).__name__}: {error}); "
            "--data-dir takes it from parquet files"
        ) from error
    return tasks


def task_files(name: str, data_dir: Path) -> dict[str, str]:
    """Name of each split to its parquet file.

    Raises:
        ConfigError: If the name is that of a group.
        StorageError: If ``data_dir`` does not have the data of the task.
    """
    if name not in task_manager().all_subtasks:
        raise ConfigError(f"{name} is a group: with --data-dir name its tasks one by one")
    definition = _definition(name)
    files = {path.stem: str(path) for path in sorted((data_dir / name).glob("*.parquet"))}
    keys = ("test_split", "validation_split")
    of_questions = [definition[key] for key in keys if definition.get(key)]
    of_examples = [definition.get("fewshot_split")] if definition.get("num_fewshot") else []
    for splits in (of_questions, of_examples):
        if splits and not files.keys() & set(splits):
            expected = " or ".join(f"{split}.parquet" for split in splits)
            raise StorageError(
                f"{data_dir / name}: no parquet file of the task {name}: expected {expected}, "
                "with the columns of the task's own data set"
            )
    return files


def _definition(name: str) -> dict[str, Any]:
    """The definition of a task in the harness; empty if the task is written in Python."""
    return task_manager().task_index[name].cfg or {}


def _offline(name: str, data_dir: Path) -> dict[str, Any]:
    """The built-in task with another source of data."""
    files = task_files(name, data_dir)
    definition = _definition(name)
    absent = {key: None for key in _SPLITS if definition.get(key) not in files}
    source = {
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }
    # only inside a group is a dict merged over the built-in definition
    return {"group": f"offline_{name}", "task": [{"task": name, **source, **absent}]}


def _seed(tasks: dict[str, Any]) -> None:
    """Set what the harness's own command sets: examples only where a task defines them.

    Its default seeds draw the examples and break ties.
    """
    import numpy as np
    import torch
    from lm_eval import defaults

    random.seed(defaults.DEFAULT_RANDOM_SEED)
    np.random.seed(defaults.DEFAULT_OTHER_SEED)
    torch.manual_seed(defaults.DEFAULT_OTHER_SEED)
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=defaults.DEFAULT_OTHER_SEED)


def _draw(tasks: dict[str, Any], limit: int, seed: int) -> dict[str, list[int]]:
    """For each task, the numbers of ``limit`` questions in rising order."""
    drawn = {}
    for name, task in tasks.items():
        total = len(task.eval_docs)
        chosen = random.Random(seed).sample(range(total), min(limit, total))
        drawn[name] = sorted(chosen)
    return drawn


def read_questions(task: str, result: Mapping[str, Any]) -> list[Question]:
    """The questions of a task, from what ``lm_eval.evaluate`` returns.

    Raises:
        DataError: If no metric of the task is a mean over questions, or a likelihood is NaN.
    """
    samples = sorted(result["samples"][task], key=lambda s: (s["filter"], s["doc_id"]))
    for sample in samples:
        # the harness would take the first choice for the likeliest
        if _has_nan(sample["filtered_resps"]):
            raise DataError(
                f"{task}: the model's likelihoods are NaN: check its weights, scales and dtype"
            )
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    questions = []
    for name in filters:
        answered = [sample for sample in samples if sample["filter"] == name]
        metrics = _means(answered, result["results"][task], name)
        # GSM8K reads each answer in two ways
        suffix = f" ({name})" if len(filters) > 1 else ""
        questions += [
            Question(
                key=f"{task}/{sample['doc_id']}{suffix}",
                prompt_hash=sample["prompt_hash"],
                answer=[[*a] if isinstance(a, tuple) else a for a in sample["filtered_resps"]],
                scores={metric + suffix: float(sample[metric]) for metric in metrics},
            )
            for sample in answered
        ]
    return questions


def _has_nan(answer: object) -> bool:
    if isinstance(answer, list | tuple):
        return any(map(_has_nan, answer))
    return isinstance(answer, float) and math.isnan(answer)


def _means(samples: list[Any], results: dict[str, Any], name: str) -> list[str]:
    """The metrics that the harness reports as the mean over the questions.

    Raises:
        DataError: If there is none, for example if only an F1 over all questions is reported.
    """
    means = []
    for metric in samples[0]["metrics"]:
        values = [sample[metric] for sample in samples]
        if not all(isinstance(value, int | float) for value in values):
            continue
        if math.isclose(sum(values) / len(values), results[f"{metric},{name}"], abs_tol=1e-9):
            means.append(metric)
    if not means:
        raise DataError(
            f"none of the metrics {samples[0]['metrics']} is a mean over questions; "
            "run this task with cats lm-eval"
        )
    return means


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's log and the data library's bars out of the terminal; errors stay."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level = logger.level
    bars = datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
