import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import normalizers

import cats
from cats.report.quality import read_quality, tables
from cats.results import read_results
from tests import models
from tests.evaluation.conftest import models_data

SMALL = ("--block", 32, "--tokens", 512)


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """Folder of a tiny model whose widths are whole groups, and its tokenizer."""
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    models.make_model(hidden_size=64, intermediate_size=128, head_dim=32).save_pretrained(folder)
    models.make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def int4(command, dense, text, tmp_path):
    """The same model in 4 bits, and a file of thresholds for it."""
    folder, file = tmp_path / "int4", tmp_path / "int4.safetensors"
    arguments = ("--method", "rtn", "--text", text, *SMALL, "-o", folder)
    code, _, err = command("quantize", dense, *arguments)
    assert code == 0, err
    code, _, err = command("calibrate", folder, "--text", text, *SMALL, "-o", file)
    assert code == 0, err
    return folder, file


@pytest.fixture
def thresholds(command, dense, text, tmp_path):
    file = tmp_path / "cats50.safetensors"
    code, _, err = command("calibrate", dense, "--text", text, *SMALL, "-o", file)
    assert code == 0, err
    return file


def test_all_four_are_compared_in_one_run(command, dense, int4, thresholds, text, tmp_path):
    folder, file = int4
    run = tmp_path / "run"
    arguments = (
        *("evaluate", dense, "--thresholds", thresholds, "--quantised", folder),
        *("--quantised-thresholds", file, "--text", text, "--block", 32, "-o", run),
    )
    code, out, err = command(*arguments, "--json")
    assert code == 0, err
    rows = {row["variant"]: row for row in json.loads(out)}
    assert [*rows] == ["dense", "cats-50", "int4", "int4-cats-50"]
    blocks = cats.data.token_blocks(models.make_tokenizer(), Path(text).read_text(), length=32)
    model = cats.from_pretrained(folder, thresholds=file)
    batches = blocks.split(4)
    value = cats.metrics.perplexity(model, batches)
    both = rows["int4-cats-50"]
    assert both["value"] == pytest.approx(value)
    loss = math.log(both["value"] / rows["dense"]["value"])
    assert both["loss_difference"] == pytest.approx(loss)
    assert both["loss_difference_stderr"] > 0
    assert rows["dense"]["loss_difference"] is None
    assert [rows[name]["bits"] for name in rows] == [None, None, 4, 4]
    # the head stays in float32
    sizes = [rows[name]["token_bytes"] for name in rows]
    assert sizes[3] < sizes[2] < sizes[1] < sizes[0]
    records = read_quality(run)
    assert {r.weights for r in records} == {records[0].weights}
    assert [row[0] for row in tables(records)[0].rows] == [*rows]
    code, out, err = command(*arguments)
    assert code == 0, err
    assert {"int4-cats-50", "MB"} <= {*out.split()}


def test_tasks_and_perplexity_stand_in_one_table(command, dense, int4, text, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    data, run = models_data(tmp_path / "data"), tmp_path / "run"
    arguments = (
        *("evaluate", dense, "--quantised", int4[0], "--tasks", "piqa,sciq"),
        *("--data-dir", data, "--text", text, "--block", 32, "-o", run),
    )
    code, out, err = command(*arguments)
    assert code == 0, err
    (row,) = (line for line in out.splitlines() if line.startswith(" int4 "))
    (score,) = (r for r in read_quality(run) if (r.variant, r.quantity) == ("int4", "perplexity"))
    change = f"{math.expm1(score.loss_difference):+.2%} ± {100 * score.loss_difference_stderr:.2f}"
    assert f"{score.value:.2f} {change}" in row
    assert row.rstrip().endswith("+0.00 ± 0.00")
    (mean,) = (
        r
        for r in read_results(run / "results.jsonl")
        if (r.variant, r.task, r.quantity) == ("int4", "mean", "acc")
    )
    assert (mean.method, mean.quantised, mean.bits) == ("quantised", "int4", 4)
    assert mean.difference_stderr is not None
    assert (run / "answers" / "int4" / "piqa.jsonl").exists()


def test_checkpoint_with_thresholds_is_measured_with_them(command_json, command, dense, int4, text):
    folder, _ = int4
    sparse = folder.with_name("sparse")
    code, _, err = command("calibrate", folder, "--text", text, *SMALL, "-o", sparse)
    assert code == 0, err
    arguments = ("--quantised", f"mine={sparse}", "--text", text, "--block", 32)
    rows = command_json("evaluate", dense, *arguments)
    assert [row["variant"] for row in rows] == ["dense", "mine", "mine-cats-50"]


def test_results_of_another_model_are_not_replaced(command, dense, int4, text, tmp_path):
    common = ("--text", text, "--block", 32, "-o", tmp_path / "run")
    assert command("evaluate", dense, "--quantised", int4[0], *common)[0] == 0
    code, _, err = command("evaluate", dense, "--dtype", "bfloat16", *common)
    assert code == 1
    assert "holds results with dtype" in err
    # also those of a later variant, before the first is measured
    (path,) = (tmp_path / "run" / "perplexity").glob("dense-*")
    path.unlink()
    arguments = ("--quantised", int4[0], "--dtype", "bfloat16", *common)
    code, _, err = command("evaluate", dense, *arguments)
    assert (code, "holds results with" in err, path.exists()) == (1, True, False)


def test_results_on_many_texts_have_a_name_that_a_file_can_have(command, dense, text, tmp_path):
    names = [tmp_path / f"{i}{'x' * 60}.txt" for i in range(5)]
    for name in names:
        name.write_text(Path(text).read_text())
    texts = [part for name in names for part in ("--text", name)]
    for _ in range(2):
        code, _, err = command("evaluate", dense, *texts, "--block", 32, "-o", tmp_path / "run")
        assert code == 0, err
    assert len([*(tmp_path / "run" / "perplexity").iterdir()]) == 1


def test_what_cannot_be_compared_is_refused(command, dense, int4, thresholds, text, tmp_path):
    folder, file = int4
    common = ("evaluate", dense, "--text", text, "--block", 32)
    cases = {
        "no layer of the model is quantised": ("--quantised", dense),
        "several need a name each": ("--quantised", folder, "--quantised", folder),
        "no --quantised of that name": ("--quantised-thresholds", f"other={file}"),
        "is no name": ("--quantised", f"dense={folder}"),
        "two variants have one name": (
            *("--quantised", f"cats-50={folder}", "--thresholds", thresholds),
        ),
        "are not the calibrated ones": (
            *("--quantised", folder, "--quantised-thresholds", thresholds),
        ),
    }
    for message, arguments in cases.items():
        code, _, err = command(*common, *arguments)
        assert (code, message in " ".join(err.split())) == (1, True), err
    other = tmp_path / "other"
    model, tokenizer = cats.checkpoint.load_dense(folder), models.make_tokenizer()
    model.save_pretrained(other)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(other)
    code, _, err = command(*common, "--quantised", other)
    assert (code, "splits text otherwise" in " ".join(err.split())) == (1, True), err


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_scale_that_is_no_number_gives_no_result(command, dense, int4, text, tmp_path, value):
    file = int4[0] / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight_scale"][3, 0] = value
    save_file(tensors, file, {"format": "pt"})
    common = ("evaluate", dense, "--quantised", int4[0], "--block", 32)
    code, _, err = command(*common, "--text", text)
    assert (code, "likelihoods are NaN" in " ".join(err.split())) == (1, True), err
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    data, run = models_data(tmp_path / "data"), tmp_path / "run"
    tasks = ("--tasks", "piqa", "--data-dir", data, "-o", run)
    code, _, err = command(*common, *tasks)
    assert (code, "likelihoods are NaN" in " ".join(err.split())) == (1, True), err
    assert not (run / "answers" / "int4").exists()
