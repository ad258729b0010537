import json
from itertools import product
from shlex import split

import pytest

from cats.evaluation import run as runs
from tests.evaluation.conftest import models_data

pytest.importorskip("lm_eval", reason="needs the extra eval")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture
def thresholds(command, checkpoint, text, tmp_path):
    path = tmp_path / "cats90.safetensors"
    code, _, err = command(
        "calibrate", checkpoint, "--text", text, "--block", 64, "--sparsity", 0.9, "-o", path
    )
    assert code == 0, err
    return path


def test_dense_and_sparse_stand_side_by_side(command, checkpoint, thresholds, tmp_path):
    data, folder = models_data(tmp_path / "data"), tmp_path / "run"
    arguments = split(
        f"evaluate {checkpoint} --thresholds {thresholds} --tasks piqa,sciq "
        f"--data-dir {data} -o {folder}"
    )
    code, out, err = command(*arguments, "--json")
    assert code == 0, err
    rows = json.loads(out)
    names = [(row["variant"], row["task"]) for row in rows if row["metric"] == "acc"]
    assert names == list(product(["dense", "cats-90"], ["piqa", "sciq", "mean"]))
    dense, sparse = (
        next(r for r in rows if (r["variant"], r["task"], r["metric"]) == (v, "piqa", "acc_norm"))
        for v in ("dense", "cats-90")
    )
    assert sparse["difference"] == pytest.approx(sparse["value"] - dense["value"])
    assert dense["questions"] == 8
    assert (folder / "answers" / "cats-90" / "sciq.jsonl").exists()
    lines = [line for line in err.splitlines() if line.startswith("cats-90: ")]
    assert lines == [
        "cats-90: asking piqa ...",
        "cats-90: piqa done",
        "cats-90: asking sciq ...",
        "cats-90: sciq done",
    ]
    assert len((folder / "results.jsonl").read_text().splitlines()) == len(rows)

    code, out, err = command(*arguments)
    assert code == 0, err
    assert "asking" not in err
    assert "splits: piqa validation, sciq validation" in out
    assert "calibrated on 1,920 tokens" in out

    code, _, err = command(*arguments, "--limit", 2)
    assert code == 1
    assert "holds answers with limit None, wanted 2" in err


@pytest.mark.parametrize("output", [True, False])
def test_stopped_evaluation_says_where_it_goes_on_if_it_does(
    command, checkpoint, tmp_path, monkeypatch, output
):
    real, folder = runs.evaluate_task, tmp_path / "run"

    def stop_at_sciq(model, tokenizer, task, **options):
        if task == "sciq":
            raise KeyboardInterrupt
        return real(model, tokenizer, task, **options)

    monkeypatch.setattr(runs, "evaluate_task", stop_at_sciq)
    data = models_data(tmp_path / "data")
    arguments = ("evaluate", checkpoint, "--tasks", "piqa,sciq", "--data-dir", data)
    code, _, err = command(*arguments, *(("-o", folder) if output else ()))
    assert code == 130
    assert (f"stopped; the same command goes on from {folder}\n" in err) == output
    assert ("stopped" in err) == output


@pytest.mark.parametrize("command_line", ["evaluate no/such", "reproduce --model no/such -o run"])
def test_absent_data_of_a_later_task_is_missed_before_the_model_is_loaded(
    command, tmp_path, monkeypatch, command_line
):
    data = models_data(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    code, _, err = command(*command_line.split(), "--tasks", "piqa,boolq", "--data-dir", data)
    assert code == 1
    assert "expected validation.parquet" in err


def test_options_that_would_be_ignored_are_errors(command, checkpoint):
    code, _, err = command("evaluate", checkpoint, "--limit", 3)
    assert (code, "--limit goes with --tasks" in err) == (1, True)
    code, _, err = command("evaluate", checkpoint, "--tasks", "piqa", "--tokens", 64)
    assert (code, "--tokens is of perplexity" in err) == (1, True)
    code, _, err = command("evaluate", checkpoint, "--batch-size", "many")
    assert (code, "expected auto or a positive number" in err) == (1, True)
