import json

import pytest
import torch

import cats
from cats.finetuning import load_adapter
from tests import models

SMALL = (
    "--block", 32, "--eval-tokens", 128, "--calibration-tokens", 256, "--batch-size", 4,
    "--steps", 2, "--eval-every", 1, "--lr", 1e-2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"question": f"{i}+{i}?", "answer": f"#### {2 * i}"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_text_is_learnt_and_the_adapter_loads(command_json, checkpoint, text, tmp_path):
    output = tmp_path / "run"
    report = command_json(
        "finetune", checkpoint, "-o", output, "--text", f"{text}[:50%]",
        "--eval-text", f"rest={text}", *SMALL, "--merge", "--rank", 4,
    )  # fmt: skip
    assert report["complete"]
    assert report["points"][-1]["losses"]["rest"] < report["points"][0]["losses"]["rest"]
    assert report["settings"]["method"] == "cats"
    assert report["settings"]["data"] == ["text.txt[0%:50%]"]
    ids = models.make_ids()
    adapter = load_adapter(checkpoint, output / "adapter")
    merged = cats.from_pretrained(output / "merged")
    assert torch.allclose(models.logits(adapter, ids), models.logits(merged, ids), atol=1e-5)


def test_table_and_bar(command, checkpoint, text, tmp_path):
    code, out, err = command(
        "finetune", checkpoint, "-o", tmp_path / "run", "--text", text,
        "--eval-text", f"same={text}", *SMALL, "--method", "relu",
    )  # fmt: skip
    assert code == 0, err
    assert "relu" in out
    assert "step 2" in err


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
    report = command_json(
        "finetune", checkpoint, "-o", tmp_path / "run", "--pairs", pairs,
        "--eval-pairs", f"sums={pairs}", "--accuracy", "--max-new-tokens", 4, *SMALL,
        "--epochs", 1, "--eval-every", 5,
    )  # fmt: skip
    assert [point["step"] for point in report["points"]] == [0, 5]
    assert 0 <= report["points"][-1]["accuracy"]["sums"] <= 1


def test_sweep_compares_and_curves_are_drawn(command, command_json, checkpoint, text, tmp_path):
    folder = tmp_path / "sweep"
    common = (
        "bench", "finetune", checkpoint, "-o", folder, "--text", text,
        "--eval-text", f"same={text}", *SMALL, "--method", "dense", "--method", "cats-50",
        "--distillation", 0, "--distillation", 0.5,
    )  # fmt: skip
    names = {"dense-lr0.01", "cats-50-lr0.01", "cats-50-lr0.01-distill0.5"}
    assert command_json(*common).keys() == names
    assert {path.stem for path in folder.iterdir()} == names
    code, out, err = command(*common)
    assert code == 0, err
    assert "recovered" in out
    assert "step 1" not in err, "nothing was run again"
    code, _, err = command("bench", "curves", folder, "-o", tmp_path / "c.svg")
    assert code == 0, err
    assert (tmp_path / "c.svg").read_text().startswith("<svg")


BAD = {
    "two kinds": (("--pairs", "PAIRS"), "not both"),
    "missing column": (("--prompt", "{absent}"), "no absent"),
    "pairs too long": (("--block", 8), "longer than 8"),
    "method": (("--method", "magic"), "no method"),
    "no evaluation to answer": (("--accuracy",), "needs --eval-pairs"),
    "unnamed": (("--eval-text", "TEXT"), "NAME=FILE"),
    "distillation": (("--full", "--distillation", 0.5), "dense model's own weights"),
    "too few": (("--batch-size", 1000), "fill no step"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line(command, checkpoint, text, pairs, tmp_path, arguments, message):
    places = {"TEXT": text, "PAIRS": pairs}
    data = ("--pairs", pairs) if arguments[0] in ("--prompt", "--block") else ("--text", text)
    code, _, err = command(
        "finetune", checkpoint, "-o", tmp_path / "run", *data, *SMALL,
        *(places.get(a, a) for a in arguments),
    )  # fmt: skip
    assert code == 1
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run").exists()
