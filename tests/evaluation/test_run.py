import copy
import dataclasses

import pytest

import cats
from cats.errors import DataError
from cats.evaluation import run
from cats.evaluation.answers import Answers
from cats.evaluation.variants import Dense, Sparse
from tests import models
from tests.evaluation.test_answers import answers

pytest.importorskip("lm_eval", reason="needs the extra eval")
datasets = pytest.importorskip("datasets", reason="needs the extra eval")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def ask(model, tokenizer, variant, data_dir, folder, tasks=("piqa", "sciq"), **options):
    options |= dict(data_dir=data_dir, folder=folder, settings={"model": "tiny"})
    return list(run.answer_tasks(model, tokenizer, variant, tasks, **options))


def test_finished_tasks_are_not_asked_again(model, tokenizer, data_dir, tmp_path, monkeypatch):
    first = ask(model, tokenizer, Dense(), data_dir, tmp_path, tasks=("piqa",))
    real, calls = run.evaluate_task, []
    monkeypatch.setattr(
        run, "evaluate_task", lambda m, t, task, **k: calls.append(task) or real(m, t, task, **k)
    )
    again = ask(model, tokenizer, Dense(), data_dir, tmp_path)
    assert calls == ["sciq"]
    assert again[0] == first[0]


def test_answers_with_other_settings_are_not_taken(model, tokenizer, data_dir, tmp_path):
    ask(model, tokenizer, Dense(), data_dir, tmp_path, tasks=("piqa",))
    with pytest.raises(DataError, match="limit None, wanted 2"):
        ask(model, tokenizer, Dense(), data_dir, tmp_path, tasks=("piqa",), limit=2)


def test_results_stand_beside_the_dense_ones(model, tokenizer, data_dir):
    sparse = Sparse(cats.calibrate(model, [models.make_ids()], target_sparsity=0.9))
    dense = ask(model, tokenizer, Dense(), data_dir, None)
    mine = ask(model, tokenizer, sparse, data_dir, None)
    records = run.results("cats-90", mine, dense)
    rows = {(r.settings["task"], r.quantity): r for r in records}
    of_tasks = [(task, metric) for task in ("piqa", "sciq") for metric in ("acc", "acc_norm")]
    assert [*rows] == [*of_tasks, ("mean", "acc")]
    assert rows["sciq", "acc"].settings["split"] == "validation"
    mean = rows["mean", "acc"]
    assert mean.value == pytest.approx((rows["piqa", "acc"].value + rows["sciq", "acc"].value) / 2)
    assert mean.settings["difference"] == pytest.approx(
        mean.value - sum(a.score("acc").value for a in dense) / 2
    )


def test_error_of_a_mean_over_tasks_is_that_of_independent_tasks():
    scores = [answers([1, 0, 1, 1]).score("acc"), answers([1, 0, 0, 1]).score("acc")]
    mean = run.mean_over_tasks(scores)
    assert mean.value == 0.625
    assert mean.stderr == pytest.approx((scores[0].stderr ** 2 + scores[1].stderr ** 2) ** 0.5 / 2)
    assert run.mean_over_tasks([dataclasses.replace(scores[0], stderr=None)]).stderr is None


def test_answers_of_other_thresholds_weights_tokenizer_or_data_are_not_taken(
    model, tokenizer, data_dir, tmp_path
):
    def sparse(**options):
        return Sparse(cats.calibrate(model, [models.make_ids()], target_sparsity=0.5, **options))

    def again(variant, model=model, tokenizer=tokenizer):
        return ask(model, tokenizer, variant, data_dir, tmp_path / "answers", tasks=("piqa",))

    first = again(sparse())
    assert again(sparse()) == first
    with pytest.raises(DataError, match="holds answers with thresholds"):
        again(sparse(exclude="model.layers.0.*"))

    again(Dense())
    other = models.make_model()
    with pytest.raises(DataError, match="holds answers with weights"):
        again(Dense(), model=other)
    with pytest.raises(DataError, match="holds answers with dtype"):
        again(Dense(), model=copy.deepcopy(model).bfloat16())
    templated = models.make_tokenizer()
    templated.chat_template = "{{ messages }}"
    with pytest.raises(DataError, match="holds answers with tokenizer"):
        again(Dense(), tokenizer=templated)

    table = datasets.Dataset.from_parquet(str(data_dir / "piqa" / "validation.parquet"))
    table.select(range(len(table) - 1)).to_parquet(data_dir / "piqa" / "validation.parquet")
    with pytest.raises(DataError, match="holds answers with data"):
        again(Dense())


def test_answers_of_an_older_release_are_not_taken(model, tokenizer, data_dir, tmp_path):
    ask(model, tokenizer, Dense(), data_dir, tmp_path, tasks=("piqa",))
    path = tmp_path / "dense" / "piqa.jsonl"
    stored = Answers.load(path)
    del stored.settings["weights"]
    stored.save(path)
    with pytest.raises(DataError, match="older release, which did not record weights"):
        ask(model, tokenizer, Dense(), data_dir, tmp_path, tasks=("piqa",))
