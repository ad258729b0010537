import pytest

import cats
from cats.errors import ConfigError, DataError, StorageError
from cats.evaluation.tasks import (
    PAPER8,
    check_data,
    evaluate_task,
    read_questions,
    task_manager,
    task_names,
)
from tests import models

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")

# the harness and the data library, not this package
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def plain(model, tokenizer, task, data_dir):
    """The harness's own answers from its own entry point: per question, in order."""
    from lm_eval.models.huggingface import HFLM

    files = {p.stem: str(p) for p in (data_dir / task).glob("*.parquet")}
    keys = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
    absent = {key: None for split, key in keys.items() if split not in files}
    source = {"dataset_path": "parquet", "dataset_kwargs": {"data_files": files}}
    member = {"task": task, "dataset_name": None, **source, **absent}
    result = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16),
        tasks=[{"group": "plain", "task": [member]}],
        task_manager=task_manager(),
    )
    return result["samples"][task], result["results"][task]


@pytest.mark.parametrize("task", ["piqa", "arc_easy"])
def test_dense_answers_equal_those_of_plain_lm_eval_question_by_question(
    task, model, tokenizer, data_dir
):
    samples, expected = plain(model, tokenizer, task, data_dir)
    answers = evaluate_task(model, tokenizer, task, data_dir=data_dir)
    assert len(answers.questions) == len(samples) == 8
    for question, sample in zip(answers.questions, samples, strict=True):
        assert question.prompt_hash == sample["prompt_hash"]
        assert question.answer == [list(a) for a in sample["filtered_resps"]]
        assert question.scores == {m: sample[m] for m in ("acc", "acc_norm")}
    for metric in ("acc", "acc_norm"):
        score = answers.score(metric)
        assert score.value == pytest.approx(expected[f"{metric},none"])
        assert score.stderr == pytest.approx(expected[f"{metric}_stderr,none"])


def test_sparse_model_answers_otherwise(model, tokenizer, data_dir):
    dense = evaluate_task(model, tokenizer, "piqa", data_dir=data_dir)
    config = cats.calibrate(model, [models.make_ids()], target_sparsity=0.9)
    sparse = evaluate_task(cats.sparsify_(model, config), tokenizer, "piqa", data_dir=data_dir)
    pairs = zip(dense.questions, sparse.questions, strict=True)
    assert all(a.answer != b.answer and a.prompt_hash == b.prompt_hash for a, b in pairs)


def test_a_missing_test_split_is_replaced_by_validation_and_named(model, tokenizer, data_dir):
    assert evaluate_task(model, tokenizer, "sciq", data_dir=data_dir).split == "validation"
    assert evaluate_task(model, tokenizer, "arc_easy", data_dir=data_dir).split == "test"


def test_limit_draws_questions_by_the_seed(model, tokenizer, data_dir):
    def drawn_keys(seed):
        answers = evaluate_task(model, tokenizer, "piqa", limit=3, seed=seed, data_dir=data_dir)
        return [q.key for q in answers.questions]

    assert drawn_keys(0) == drawn_keys(0)
    assert len(set(map(str, map(drawn_keys, range(4))))) > 1
    assert len(drawn_keys(0)) == 3


def test_paper8_names_the_eight_tasks():
    assert task_names("paper8, gsm8k,mmlu,piqa") == [*PAPER8, "gsm8k", "mmlu"]


def test_unknown_tasks_absent_data_and_groups_offline_are_errors(model, tokenizer, data_dir):
    with pytest.raises(ConfigError, match="no task 'piga'"):
        task_names("piga")
    with pytest.raises(ConfigError, match="wikitext asks no questions"):
        task_names("sciq,wikitext")
    with pytest.raises(StorageError, match="no parquet file of the task boolq: expected"):
        evaluate_task(model, tokenizer, "boolq", data_dir=data_dir)
    with pytest.raises(ConfigError, match="mmlu is a group"):
        evaluate_task(model, tokenizer, "mmlu", data_dir=data_dir)


@pytest.mark.parametrize(
    ("task", "files", "expected"),
    [
        ("piqa", ["train"], "expected validation.parquet,"),
        ("piqa", ["test"], "expected validation.parquet,"),
        ("sciq", ["train"], "expected test.parquet or validation.parquet,"),
        ("gsm8k", ["test"], "expected train.parquet,"),
        ("mnli", ["validation"], "expected validation_matched.parquet,"),
    ],
)
def test_splits_that_cannot_be_asked_are_missed_before_any_is(tmp_path, task, files, expected):
    (tmp_path / task).mkdir()
    for name in files:
        (tmp_path / task / f"{name}.parquet").touch()
    with pytest.raises(StorageError, match=expected):
        check_data([task], tmp_path)


def harness_result(task, metrics, *samples):
    """What the harness returns, for samples of ``(number, filter, values of the metrics)``."""

    def row(i, name, values):
        question = {"doc_id": i, "prompt_hash": f"hash{i}"}
        answer = {"filter": name, "filtered_resps": ["42"], "metrics": [*values], **values}
        return question | answer

    rows = [row(*sample) for sample in samples]
    return {"samples": {task: rows}, "results": {task: metrics}}


def test_answers_that_are_read_in_two_ways_give_two_metrics():
    both = harness_result(
        "gsm8k",
        {"exact_match,strict": 0.5, "exact_match,flexible": 1.0},
        (1, "strict", {"exact_match": 1.0}),
        (1, "flexible", {"exact_match": 1.0}),
        (0, "strict", {"exact_match": 0.0}),
        (0, "flexible", {"exact_match": 1.0}),
    )
    assert [(q.key, q.scores) for q in read_questions("gsm8k", both)] == [
        ("gsm8k/0 (flexible)", {"exact_match (flexible)": 1.0}),
        ("gsm8k/1 (flexible)", {"exact_match (flexible)": 1.0}),
        ("gsm8k/0 (strict)", {"exact_match (strict)": 0.0}),
        ("gsm8k/1 (strict)", {"exact_match (strict)": 1.0}),
    ]


def test_metrics_that_are_no_mean_over_questions_are_left_out():
    means = {"acc,none": 1.0, "f1,none": 0.3}
    result = harness_result("cb", means, (0, "none", {"acc": 1.0, "f1": (1, 1)}))
    questions = read_questions("cb", result)
    assert questions[0].scores == {"acc": 1.0}
    with pytest.raises(DataError, match="none of the metrics"):
        read_questions("cb", harness_result("cb", {"acc,none": 0.3}, (0, "none", {"acc": 1.0})))
