import shutil
from pathlib import Path
from shlex import split

import pytest

from cats.benchmarks import decode, mlp
from cats.errors import CatsError
from cats.evaluation import run as runs
from cats.results import read_results
from tests import models
from tests.evaluation.conftest import models_data
from tests.records import mlp_time, token_time

pytest.importorskip("lm_eval", reason="needs the extra eval")
pytest.importorskip("matplotlib", reason="needs the extra report")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

VARIANTS = ["dense", "cats-50", "relu", "input-33.3", "teal-33.3"]


@pytest.fixture
def reproduce(command, checkpoint, text, tmp_path):
    data = models_data(tmp_path / "data")

    def run(*options):
        common = split(
            f"reproduce --model {checkpoint} -o {tmp_path / 'run'} --text {text} --samples 8 "
            f"--length 64 --sparsity 0.5 --tasks piqa,sciq --data-dir {data} --limit 4"
        )
        return command(*common, *options)

    return run


def test_the_whole_recipe_ends_in_a_report_and_is_resumed(reproduce, tmp_path, monkeypatch):
    code, out, err = reproduce()
    assert code == 0, err
    folder = tmp_path / "run"
    assert out.replace("\n", "").endswith("report.html")
    page = (folder / "report.html").read_text()
    assert "sciq (validation, 4)" in page
    assert "Calibrated on 8 blocks of 64 tokens of text.txt, seed 0." in page
    assert "Mistral-7B" in page

    tasks = read_results(folder / "tasks.jsonl")
    assert list(dict.fromkeys(r.settings["variant"] for r in tasks)) == VARIANTS
    shares = {
        r.settings["variant"]: r.settings["mlp_share"]
        for path in (folder / "perplexity").iterdir()
        for r in read_results(path)
    }
    assert sorted(shares) == sorted(VARIANTS)
    assert shares["cats-50"] == pytest.approx(2 / 3, abs=0.04)
    assert shares["teal-33.3"] == pytest.approx(2 / 3, abs=0.04)
    timed = [r for r in read_results(folder / "tokens.jsonl") if r.quantity == "time"]
    assert {r.settings["sparsity"] for r in timed} == {0.0, 0.5}

    def never(*arguments, **options):
        raise CatsError("measured again")

    before = {path: path.read_bytes() for path in folder.rglob("*.jsonl")}
    monkeypatch.setattr(runs, "evaluate_task", never)
    monkeypatch.setattr(runs, "measure_perplexity", never)
    code, _, err = reproduce()
    assert code == 0, err
    assert {path: path.read_bytes() for path in folder.rglob("*.jsonl")} == before

    code, _, err = reproduce("--seed", 1)
    assert code == 1
    assert "recipe.json: holds results with calibration_seed 0, wanted 1" in err


def test_another_target_in_the_same_folder_stands_beside_the_first(
    reproduce, tmp_path, monkeypatch
):
    def timed(record, case):
        return [record(1.0, sparsity=sparsity) for sparsity in case.sparsities]

    monkeypatch.setattr(mlp, "measure", lambda case: timed(mlp_time, case))
    monkeypatch.setattr(decode, "measure", lambda model, blocks, case, **_: timed(token_time, case))
    common = ("--methods", "cats", "--tasks", "sciq")
    for target in (0.5, 0.3):
        code, _, err = reproduce(*common, "--sparsity", target)
        assert code == 0, err
    folder = tmp_path / "run"
    tasks = read_results(folder / "tasks.jsonl")
    assert {r.settings["variant"] for r in tasks} == {"dense", "cats-30", "cats-50"}
    tokens = read_results(folder / "tokens.jsonl")
    assert [r.settings["sparsity"] for r in tokens] == [0.0, 0.3, 0.5]
    calls = read_results(folder / "mlp-float32.jsonl")
    assert [r.settings["sparsity"] for r in calls] == [0.3, 0.5]


def test_a_missing_text_is_an_error_before_the_model_is_loaded(command, tmp_path):
    for option in ("--text", "--eval-text"):
        absent = tmp_path / "absent.txt"
        code, _, err = command("reproduce", "-o", tmp_path, "--model", "absent", option, absent)
        assert code == 1
        assert "absent.txt: no such file" in err.replace("\n", " ")


def test_stopped_recipe_says_where_it_goes_on(reproduce, tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "measure_perplexity", stop)
    code, _, err = reproduce("--methods", "relu")
    assert code == 130
    assert f"stopped; the same command goes on from {tmp_path / 'run'}\n" in err


def test_a_wrong_target_is_an_error_before_the_model_is_loaded(command, tmp_path):
    code, _, err = command("reproduce", "-o", tmp_path, "--model", "absent", "--sparsity", "50")
    assert code == 1
    assert "the target sparsity must be a share inside (0, 1)" in err


def test_methods_may_be_named(reproduce, command, tmp_path):
    code, _, err = reproduce("--methods", "cats,input", "--tasks", "sciq", "--no-speed")
    assert code == 0, err
    tasks = read_results(tmp_path / "run" / "tasks.jsonl")
    named = list(dict.fromkeys(result.settings["variant"] for result in tasks))
    assert named == ["dense", "cats-50", "input-33.3"]
    code, _, err = command("reproduce", "-o", tmp_path, "--model", "absent", "--methods", "dejavu")
    assert code == 1
    assert "--methods" in err


def test_results_of_other_weights_or_text_under_the_same_name_are_refused(
    reproduce, command, checkpoint, text, tmp_path
):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    common = ("--model", folder, "--methods", "cats", "--tasks", "sciq", "--no-speed")
    code, _, err = reproduce(*common)
    assert code == 0, err
    weights = (folder / "model.safetensors").read_bytes()
    models.make_model().save_pretrained(folder)
    code, _, err = reproduce(*common)
    assert (code, "holds results with weights" in err) == (1, True)

    (folder / "model.safetensors").write_bytes(weights)
    code, _, err = reproduce(*common)
    assert code == 0, err
    Path(text).write_text("Of another kind was this one, but of the same name. " * 60)
    code, _, err = reproduce(*common)
    assert (code, "holds results with calibration_hash" in err) == (1, True)


def test_perplexity_and_profile_of_something_else_are_refused(reproduce, tmp_path):
    other, run = tmp_path / "other.txt", tmp_path / "run"
    common = ("--methods", "cats", "--tasks", "sciq", "--no-speed", "--eval-text", other)
    other.write_text("It is a text. " * 60)
    code, _, err = reproduce(*common)
    assert code == 0, err
    other.write_text("It is a tale. " * 60)
    code, _, err = reproduce(*common)
    assert (code, "holds results with text_hash" in err) == (1, True)

    other.write_text("It is a text. " * 60)
    path = run / "profile-cats-50.json"
    path.write_text(path.read_text().replace('"thresholds": "', '"thresholds": "0'))
    code, _, err = reproduce(*common)
    assert (code, "holds activations with thresholds" in err) == (1, True)


def test_folder_of_an_older_release_is_refused(reproduce, tmp_path):
    common = ("--methods", "cats", "--tasks", "sciq", "--no-speed")
    code, _, err = reproduce(*common)
    assert code == 0, err
    (tmp_path / "run" / "recipe.json").unlink()
    code, _, err = reproduce(*common)
    assert (code, "no recipe.json that says what they are of" in err) == (1, True)


def test_methods_with_several_masks_read_the_bytes_of_cats(reproduce, tmp_path):
    options = ("--methods", "cats,cascade", "--tasks", "none", "--no-speed")
    code, _, err = reproduce(*options)
    assert code == 0, err
    (path,) = (tmp_path / "run" / "perplexity").glob("cascade-b66.7*")
    (record,) = read_results(path)
    assert (record.method, record.target_bytes) == ("cascade", pytest.approx(2 / 3))
    assert record.mlp_share == pytest.approx(2 / 3, abs=0.06)
    before = path.read_bytes()
    assert reproduce(*options)[0] == 0
    assert path.read_bytes() == before
