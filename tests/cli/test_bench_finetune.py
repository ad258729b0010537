from shlex import split

import pytest

from tests.cli.test_finetune import SMALL

pytestmark = pytest.mark.usefixtures("one_thread")


def test_sweep_compares_and_curves_are_drawn(command, command_json, checkpoint, text, tmp_path):
    folder = tmp_path / "sweep"
    common = split(
        f"bench finetune {checkpoint} -o {folder} --text {text} --eval-text same={text} "
        "--method dense --method cats-50 --distillation 0 --distillation 0.5"
    )
    common += SMALL
    names = {"dense-lr0.01", "cats-50-lr0.01", "cats-50-lr0.01-distill0.5"}
    assert command_json(*common).keys() == names
    assert {path.stem for path in folder.iterdir()} == names
    code, out, err = command(*common)
    assert code == 0, err
    assert "recovered" in out
    assert "step 1" not in err, "nothing was run again"
    curves = ("bench", "results", "curves", folder, "-o")
    code, _, err = command(*curves, tmp_path / "c.svg")
    assert code == 0, err
    assert (tmp_path / "c.svg").read_text().startswith("<svg")
    code, _, err = command(*curves, tmp_path / "c.pdf")
    assert code == 1
    assert "name a picture .svg or .png" in err


def test_sweep_says_which_methods_go_without_an_option(command, checkpoint, text, tmp_path):
    methods = split("--method dense --method cats-50 --distillation 0.5 --recalibrate 1")
    run = ("bench", "finetune", checkpoint, "-o", tmp_path / "sweep", "--text", text, *SMALL)
    code, _, err = command(*run, *methods)
    assert code == 0, err
    lines = [line for line in err.splitlines() if "without" in line]
    assert lines == [
        "dense: without --distillation, a dense model would be its own teacher",
        "dense: without --recalibrate, only cats has a target sparsity to calibrate for",
    ]
    names = {"dense-lr0.01", "cats-50-lr0.01-distill0.5-recalibrate1"}
    assert {path.stem for path in (tmp_path / "sweep").iterdir()} == names


EARLY = {
    "answers of a sweep": (("--max-new-tokens", 9), "without --accuracy"),
    "dense teachers": (
        ("--method", "dense", "--distillation", 0.5),
        "--distillation has no use for dense",
    ),
    "thresholds of none": (
        ("--method", "dense", "--method", "relu", "--recalibrate", 5),
        "--recalibrate has no use for dense, relu",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), EARLY.values(), ids=EARLY)
def test_option_that_would_be_ignored_is_refused_before_the_model_is_loaded(
    command, tmp_path, arguments, message
):
    code, _, err = command("bench", "finetune", "no/such-model", "-o", tmp_path, *arguments)
    assert code == 1
    assert err.startswith("error: ")
    assert message in err
