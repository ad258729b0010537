import json
from shlex import split

import pytest
import torch

import cats
from cats.cli.finetune_bar import StepBar
from cats.finetuning import load_adapter
from cats.recipes.training_data import TrainingData
from tests import models

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = split(
    "--block 32 --eval-tokens 128 --calibration-tokens 256 --batch-size 4 --steps 2 "
    "--eval-every 1 --lr 1e-2"
)


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"question": f"{i}+{i}?", "answer": f"#### {2 * i}"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_text_is_learnt_and_the_adapter_loads(command_json, checkpoint, text, tmp_path):
    output = tmp_path / "run"
    data = ("--text", f"{text}[:50%]", "--eval-text", f"rest={text}")
    run = ("finetune", checkpoint, "-o", output, *data, *SMALL)
    report = command_json(*run, "--merge", "--rank", 4)
    assert report["complete"]
    assert report["points"][-1]["losses"]["rest"] < report["points"][0]["losses"]["rest"]
    assert report["settings"]["method"] == "cats"
    assert report["settings"]["data"] == ["text.txt[0%:50%]"]
    ids = models.make_ids()
    adapter = load_adapter(checkpoint, output / "adapter")
    merged = cats.from_pretrained(output / "merged")
    assert torch.allclose(models.logits(adapter, ids), models.logits(merged, ids), atol=1e-5)


def test_table_and_bar(command, checkpoint, text, tmp_path):
    data = ("--text", text, "--eval-text", f"same={text}")
    run = ("finetune", checkpoint, "-o", tmp_path / "run", *data, *SMALL)
    code, out, err = command(*run, "--method", "relu")
    assert code == 0, err
    assert "relu" in out
    assert "step 2" in err
    assert "was complete already" not in " ".join(out.split())


def test_complete_run_says_so(command, checkpoint, text, tmp_path):
    run = ("finetune", checkpoint, "-o", tmp_path / "run", "--text", text, *SMALL)
    assert command(*run)[0] == 0
    code, out, _ = command(*run)
    assert code == 0
    assert "was complete already" in " ".join(out.split())


def test_other_options_than_those_of_the_run_are_refused_before_the_model_is_loaded(
    command, checkpoint, text, tmp_path
):
    run = ("-o", tmp_path / "run", "--text", text, *SMALL)
    assert command("finetune", checkpoint, *run)[0] == 0
    changed = ("--steps", 3, "--eval-every", 2, "--target", "q_proj")
    code, _, err = command("finetune", "no/such-model", *run, *changed)
    assert code == 1
    assert (
        "holds a run with --steps 2, now 3; --target default, now q_proj; --eval-every 1, now 2: "
    ) in err
    # steps are known once the data is read
    code, _, err = command("finetune", checkpoint, *run, "--epochs", 10)
    assert (code, "options.steps" in err) == (1, True)


def test_target_that_is_no_layer_is_refused_before_the_data_is_read(
    command, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.delattr(TrainingData, "train")
    run = ("finetune", checkpoint, "-o", tmp_path / "run", "--text", "a.txt")
    code, _, err = command(*run, "--target", "q_proj", "--target", "foo")
    assert code == 1
    assert "no adapters on 'foo'" in err
    assert "down_proj, gate_proj" in err


@pytest.mark.parametrize(("save_every", "said"), [(1, True), (0, False)])
def test_stopped_run_says_where_it_goes_on_if_it_does(
    command, checkpoint, text, tmp_path, monkeypatch, save_every, said
):
    real = StepBar.show

    def stop_at_step_2(self, point):
        real(self, point)
        if point.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(StepBar, "show", stop_at_step_2)
    run = ("finetune", checkpoint, "-o", tmp_path / "run", "--text", text, *SMALL)
    code, _, err = command(*run, "--steps", 3, "--save-every", save_every)
    assert code == 130
    assert (f"stopped; the same command goes on from {tmp_path / 'run'}\n" in err) == said


def test_thresholds_file_and_sparse_checkpoint_are_taken(
    command, command_json, checkpoint, text, tmp_path
):
    file, folder = tmp_path / "t.safetensors", tmp_path / "sparse"
    small = ("--text", text, "--block", 32, "--tokens", 256, "--eval-tokens", 64)
    assert command("calibrate", checkpoint, *small, "-o", file)[0] == 0
    assert command("calibrate", checkpoint, *small, "-o", folder)[0] == 0
    common = ("--text", text, "--eval-text", f"same={text}", *SMALL, "--rank", 4)
    one = command_json("finetune", checkpoint, "-o", tmp_path / "1", "--thresholds", file, *common)
    two = command_json("finetune", folder, "-o", tmp_path / "2", *common)
    assert one["points"][-1]["losses"] == two["points"][-1]["losses"]
    assert one["settings"]["target_sparsity"] == 0.5


def test_pairs_are_learnt_and_answers_counted(command_json, checkpoint, pairs, tmp_path):
    data = ("--pairs", pairs, "--eval-pairs", f"sums={pairs}")
    run = ("finetune", checkpoint, "-o", tmp_path / "run", *data, *SMALL)
    answers = ("--accuracy", "--max-new-tokens", 4)
    report = command_json(*run, *answers, "--epochs", 1, "--eval-every", 5)
    assert [point["step"] for point in report["points"]] == [0, 5]
    assert 0 <= report["points"][-1]["accuracy"]["sums"] <= 1


def test_default_number_of_tokens_is_never_refused(command, checkpoint, text, tmp_path):
    data = ("--text", text, "--eval-text", f"same={text}")
    run = ("finetune", checkpoint, "-o", tmp_path / "run", *data)
    code, _, err = command(*run, "--block", 200_000)
    assert code == 1
    assert "too few for one block of 200000" in err


BAD = {
    "two kinds": (("--pairs", "PAIRS"), "not both"),
    "missing column": (("--prompt", "{absent}"), "no absent"),
    "pairs too long": (("--block", 8), "longer than 8"),
    "method": (("--method", "magic"), "no method"),
    "no evaluation to answer": (("--accuracy",), "needs --eval-pairs"),
    "unnamed": (("--eval-text", "TEXT"), "NAME=FILE"),
    "distillation": (("--full", "--distillation", 0.5), "dense model's own weights"),
    "too few": (("--batch-size", 1000), "fill no step"),
    "no epochs": (("--epochs", 0), "--epochs must be positive"),
    "endless epochs": (("--epochs", "nan"), "--epochs must be positive"),
    "two targets": (("--thresholds", "TEXT", "--sparsity", 0.7), "have their target"),
    "target of none": (("--method", "relu", "--sparsity", 0.7), "no --sparsity"),
    "format without pairs": (("--answer", "{label}"), "are for --pairs"),
    "text without use": (("--method", "dense", "--calibration-text", "TEXT"), "no use"),
    "broken part": (("--eval-text", "a=TEXT[5%]"), "a part such as"),
    "file for a folder": (("--output", "TEXT"), "no folder to write in"),
    "part of a block": (("--eval-text", "a=TEXT", "--eval-tokens", 8), "--eval-tokens 8 is less"),
    "part of a block to calibrate": (("--calibration-tokens", 8), "--calibration-tokens 8 is less"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line(command, checkpoint, text, pairs, tmp_path, arguments, message):
    data = ("--pairs", pairs) if arguments[0] in ("--prompt", "--block") else ("--text", text)
    files = (str(a).replace("TEXT", str(text)).replace("PAIRS", str(pairs)) for a in arguments)
    run = ("finetune", checkpoint, "-o", tmp_path / "run", *data, *SMALL)
    code, _, err = command(*run, *files)
    assert code == 1
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run").exists()


EARLY = {
    "full and a rank": (("--full", "--rank", 64), "leave it out, or --rank"),
    "full and adapters": (
        ("--full", "--alpha", 8, "--dropout", 0.0, "--target", "q_proj"),
        "leave it out, or --alpha, --dropout, --target",
    ),
    "answers that are not generated": (("--max-new-tokens", 9), "--max-new-tokens"),
    "answers at once": (("--answer-batch-size", 9), "leave out --answer-batch-size"),
    "dense teacher": (("--method", "dense", "--distillation", 0.5), "own teacher"),
    "dense thresholds": (("--method", "dense", "--recalibrate", 5), "only cats has"),
    "relu thresholds": (("--method", "relu", "--recalibrate", 5), "only cats has"),
    "impossible": (("--lr", -1), "learning_rate must be positive"),
}


@pytest.mark.parametrize(("arguments", "message"), EARLY.values(), ids=EARLY)
def test_option_that_would_be_ignored_is_refused_before_the_model_is_loaded(
    command, tmp_path, arguments, message
):
    code, _, err = command("finetune", "no/such-model", "-o", tmp_path / "run", *arguments)
    assert code == 1
    assert err.startswith("error: ")
    assert message in err
