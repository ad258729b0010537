from pathlib import Path

import pytest
import torch

import cats
from cats.recipes import counting
from tests import models

SMALL = ("--block", 32, "--tokens", 512, "--eval-tokens", 256)


def test_thresholds_file_applies_to_the_base_model(command_json, checkpoint, text, tmp_path):
    path = tmp_path / "t.safetensors"
    report = command_json("calibrate", checkpoint, "--text", text, *SMALL, "-o", path)
    assert report["target_sparsity"] == 0.5
    model = cats.from_pretrained(checkpoint, thresholds=path)
    assert model.config.cats["calibration_tokens"] == report["calibration_tokens"] == 512
    assert all(0.3 < share < 0.7 for share in report["realized_sparsity"].values())


def test_interrupted_calibration_resumes_to_the_same_thresholds(
    command, checkpoint, text, tmp_path, monkeypatch
):
    monkeypatch.setattr(counting, "SAVE_EVERY", 1)
    common = ("calibrate", checkpoint, "--text", text, *SMALL)
    assert command(*common, "-o", tmp_path / "whole.safetensors")[0] == 0

    def interrupt(*_):
        raise KeyboardInterrupt

    resumed = (*common, "-o", tmp_path / "resumed.safetensors", "--statistics", tmp_path / "s")
    saved = cats.Statistics.save
    calls = []

    def save_twice(self, path):
        saved(self, path)
        calls.append(self.blocks)
        if len(calls) == 2:
            interrupt()

    monkeypatch.setattr(cats.Statistics, "save", save_twice)
    code, _, err = command(*resumed)
    assert code == 130
    assert f"stopped; the same command goes on from {tmp_path / 's'}\n" in err
    assert not (tmp_path / "resumed.safetensors").exists()
    assert command(*resumed)[0] == 0
    assert calls == [4, 8, 12, 16]
    whole, again = (
        (tmp_path / f"{name}.safetensors").read_bytes() for name in ("whole", "resumed")
    )
    assert whole == again
    code, _, err = command(*resumed, "--seed", 1)
    assert code == 1
    assert "another text" in err
    code, _, err = command(*resumed, "--exclude", "*.0.*")
    assert code == 1
    assert "exclude" in err


def test_finished_calibration_is_extended_from_a_batch_that_was_not_full(
    command, checkpoint, text, tmp_path
):
    path = tmp_path / "s.safetensors"
    common = ("calibrate", checkpoint, "--text", text, "--block", 32, "--eval-tokens", 64)
    assert command(*common, "--tokens", 32 * 7, "--statistics", path)[0] == 0
    assert cats.Statistics.load(path).blocks == 7
    assert command(*common, "--tokens", 32 * 12, "--statistics", path)[0] == 0
    assert cats.Statistics.load(path).blocks == 12
    code, _, err = command(*common, "--tokens", 32 * 5, "--statistics", path)
    assert code == 1
    assert "more than are asked for" in err


def test_brackets_in_names_are_no_markup(command, checkpoint, text, tmp_path):
    output = tmp_path / "a[" / "b].safetensors"
    code, out, err = command("calibrate", checkpoint, "--text", text, *SMALL, "-o", output)
    assert code == 0, err
    assert "b].safetensors" in out.replace("\n", "")


def test_default_number_of_tokens_is_at_least_one_block(command_json, checkpoint, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("It is a truth universally acknowledged. " * 600)
    report = command_json("calibrate", checkpoint, "--text", path, "--block", 10_001)
    assert report["held_out_tokens"] == report["calibration_tokens"] == 10_001


@pytest.mark.parametrize("arguments", [("calibrate", "MODEL", "--text"), ("profile", "MODEL")])
def test_default_number_of_tokens_is_never_refused(command, checkpoint, text, arguments):
    values = {"MODEL": checkpoint}
    code, _, err = command(*(values.get(a, a) for a in arguments), text, "--block", 200_000)
    assert code == 1
    assert "the text has 2400 tokens, too few for one block of 200000" in err


def test_split_of_masks_is_found_and_applied(command, command_json, checkpoint, text, tmp_path):
    path = tmp_path / "cascade.safetensors"
    goal = ("--method", "cascade", "--bytes", "0.6", "--attention")
    report = command_json("calibrate", checkpoint, "--text", text, *SMALL, *goal, "-o", path)
    assert (report["target_bytes"], report["target_sparsity"]) == (0.6, None)
    assert report["bytes_read"] == pytest.approx(0.6, abs=0.08)
    use = ("--thresholds", path)
    for arguments in (
        ("evaluate", checkpoint, "--text", text, "--block", 32, *use),
        ("generate", checkpoint, "a", "--engine", "eager", *use),
        ("info", path),
    ):
        code, _, err = command(*arguments)
        assert code == 0, err


BAD = {
    "two goals": ("calibrate", "MODEL", "--sparsity", "0.5", "--bytes", "0.5"),
    "several masks and a sparsity": (
        "calibrate",
        "MODEL",
        "--method",
        "cascade",
        "--sparsity",
        "0.5",
    ),
    "relu and a target": ("calibrate", "MODEL", "--method", "relu", "--sparsity", "0.5"),
    "a target and a loss": ("calibrate", "MODEL", "--sparsity", "0.5", "--max-loss", "2%"),
    "pattern of nothing": ("calibrate", "MODEL", "--exclude", "*vision*"),
    "part of a block": ("calibrate", "MODEL", "--tokens", "100"),
    "part of a block to evaluate": ("evaluate", "MODEL", "--tokens", "100"),
    "part of a block to profile": ("profile", "MODEL", "--tokens", "100"),
    "profile as folder": ("profile", "MODEL", "-o", "FOLDER.safetensors"),
    "recipe at 0": ("reproduce", "--model", "no/such", "--sparsity", "0", "-o", "r"),
    "recipe as file": ("reproduce", "--model", "no/such", "-o", "TEXT"),
    "relu and a loss": ("calibrate", "MODEL", "--method", "relu", "--max-loss", "2%"),
    "no percent": ("calibrate", "MODEL", "--max-loss", "2"),
    "folder as file": ("calibrate", "MODEL", "-o", "FOLDER.safetensors"),
    "unknown model": ("calibrate", "no/such-model"),
    "unknown text": ("calibrate", "MODEL", "--text", "absent.txt"),
    "target 0": ("calibrate", "MODEL", "--sparsity", "0"),
    "target 1": ("calibrate", "MODEL", "--sparsity", "1"),
    "max loss": ("calibrate", "MODEL", "--max-loss", "much"),
    "method": ("calibrate", "MODEL", "--text", "TEXT", "--block", "32", "--method", "magic"),
    "too short": ("calibrate", "MODEL", "--text", "TEXT", "--block", "100001"),
    "device": ("evaluate", "MODEL", "--device", "toaster"),
    "thresholds": ("evaluate", "MODEL", "--thresholds", "absent.safetensors"),
    "info": ("info", "absent.safetensors"),
    "empty prompt": ("generate", "MODEL", ""),
    "top-p of a greedy token": ("generate", "MODEL", "a", "--top-p", "2"),
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line(command, checkpoint, text, arguments):
    folder = Path(text).parent / "folder.safetensors"
    folder.mkdir()
    values = {"MODEL": checkpoint, "TEXT": text, "FOLDER.safetensors": folder}
    code, _, err = command(*(values.get(a, a) for a in arguments))
    assert code == 1
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in err


EARLY = {
    "text file for thresholds": (("calibrate", "-o", "t.txt"), "NAME.safetensors"),
    "upper case": (("calibrate", "-o", "T.SAFETENSORS"), "NAME.safetensors"),
    "suffix of a checkpoint": (("calibrate", "-o", "cats.bin"), "a name without .bin"),
    "folder for statistics": (("calibrate", "--statistics", "."), "is a folder"),
    "relu and a target": (
        ("calibrate", "--method", "relu", "--sparsity", 0.5),
        "no goal to choose",
    ),
    "part of a block": (("calibrate", "--tokens", 100), "--tokens 100 is less than one block"),
    "part held out": (("calibrate", "--eval-tokens", 100), "--eval-tokens 100 is less than"),
    "profile as folder": (("profile", "-o", "."), "is a folder"),
    "file for answers": (("evaluate", "--tasks", "piqa", "-o", __file__), "no folder to write"),
}


@pytest.mark.parametrize(("arguments", "message"), EARLY.values(), ids=EARLY)
def test_option_that_would_be_misread_is_refused_before_the_model_is_loaded(
    command, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(arguments[0], "no/such-model", *arguments[1:])
    assert code == 1
    assert err.startswith("error: ")
    assert message in err
    assert not any(tmp_path.iterdir())


WORDS = {
    "percent": (("--sparsity", 50), "a share inside (0, 1), such as 0.5 for 50 %; got 50"),
    "text": (("--text", "none.txt"), "error: none.txt: no such file"),
    "pattern": (
        ("--exclude", "foo.*"),
        "matches no MLP of this model, which are named like 'model.layers.0.mlp'",
    ),
    "pattern of no MLP": (("--exclude", "lm_head"), "matches no MLP"),
    "all": (("--exclude", "*.0.*", "--exclude", "*.1.*"), "*.0.* *.1.* leaves no MLP"),
}


@pytest.mark.parametrize(("arguments", "message"), WORDS.values(), ids=WORDS)
def test_errors_speak_of_what_was_given(command, checkpoint, arguments, message):
    code, _, err = command("calibrate", checkpoint, *arguments)
    assert code == 1
    assert message in err


@pytest.mark.parametrize("name", ["sparse", "Qwen2.5-7B", "there.d"])
def test_name_without_a_suffix_is_a_whole_checkpoint(command, checkpoint, text, tmp_path, name):
    (tmp_path / "there.d").mkdir()
    code, _, err = command("calibrate", checkpoint, "--text", text, *SMALL, "-o", tmp_path / name)
    assert code == 0, err
    assert cats.from_pretrained(tmp_path / name).config.cats["method"] == "cats"


def test_max_loss_is_found_and_told(command, command_json, checkpoint, text):
    common = ("calibrate", checkpoint, "--text", text, *SMALL, "--max-loss", "50%")
    report = command_json(*common)
    assert report["perplexity_sparse"] <= 1.5 * report["perplexity_dense"]
    assert report["max_loss"] == 0.5
    code, out, err = command(*common)
    assert code == 0, err
    share = f"{report['target_sparsity']:.0%}"
    assert f"{share} is the largest sparsity whose held-out perplexity rises" in out
    assert "One perplexity takes about" in err


def test_relu_has_no_target(command_json, checkpoint, text):
    report = command_json("calibrate", checkpoint, "--text", text, *SMALL, "--method", "relu")
    assert report["target_sparsity"] is None
    assert set(report["thresholds"].values()) == {0.0}


def test_dense_model_alone_is_evaluated_without_empty_columns(command, checkpoint, text, tmp_path):
    path = tmp_path / "t.safetensors"
    assert command("calibrate", checkpoint, "--text", text, *SMALL, "-o", path)[0] == 0
    evaluate = ("evaluate", checkpoint, "--text", text, "--block", 32, "--tokens", 64)
    code, out, err = command(*evaluate)
    assert code == 0, err
    assert "perplexity" in out
    assert not {"realised", "change"} & {*out.split()}
    code, out, err = command(*evaluate, "--thresholds", path)
    assert code == 0, err
    assert {"realised", "change", "cats-50"} <= {*out.split()}


def test_generate_shows_the_text_as_it_is(command, command_json, checkpoint):
    arguments = ("generate", checkpoint, "abc", "--max-new-tokens", 40, "--temperature", 2)
    code, out, _ = command(*arguments)
    assert code == 0
    assert out == command_json(*arguments)["text"] + "\n"


def test_generate_and_evaluate_print_json(command_json, checkpoint, text):
    report = command_json("generate", checkpoint, "abc", "--max-new-tokens", 3)
    assert report["new_tokens"] <= 3
    report = command_json("evaluate", checkpoint, "--text", text, "--block", 32, "--tokens", 64)
    model = cats.checkpoint.load_dense(checkpoint)
    blocks = cats.data.token_blocks(
        models.make_tokenizer(), Path(text).read_text(), length=32, limit=2
    )
    assert torch.isclose(
        torch.tensor(report["perplexity_dense"]),
        torch.tensor(cats.metrics.perplexity(model, [blocks])),
        rtol=1e-4,
    )
