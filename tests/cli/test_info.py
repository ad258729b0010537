import dataclasses
from pathlib import Path
from shlex import split

import pytest
import torch
from transformers import LlamaConfig

import cats
from cats.decode import ENGINES
from tests import models

SMALL = ("--block", 32, "--tokens", 256, "--eval-tokens", 64)


def test_installation_names_every_backend(command_json):
    report = command_json("info")
    assert report["backends of cats::gated_mlp"].keys() == cats.ops.backends().keys()


def test_model_shows_the_engine_that_would_decode_it_and_why_not_another(command_json, checkpoint):
    report = command_json("info", checkpoint)
    assert {"thresholds": "none: a dense model"} in report.values()
    assert report["architecture"] == {
        "model": "LlamaForCausalLM",
        "layers": 2,
        "hidden_size": 16,
        "parameters": 13_680,
        "dtype": "float32",
        "gated_mlps": 2,
        "intermediate_size": 40,
        "activation": "silu",
    }
    engines = report["engines of cats.generate"]
    assert engines.keys() == set(ENGINES)
    assert list(engines.values()).count("is taken") == 1
    if not torch.cuda.is_available():
        assert engines["stream"] == "is taken"
        assert "on a CPU stream is taken" in engines["compiled"]


def test_model_that_the_loop_cannot_decode_says_why(command_json, tmp_path):
    config = LlamaConfig(**models.SIZES, layer_types=["full_attention", "linear_attention"])
    config.save_pretrained(tmp_path)
    reason = command_json("info", tmp_path)["engines of cats.generate"]["none"]
    assert "linear_attention" in reason


def test_thresholds_and_statistics_are_described_in_words(command, checkpoint, text, tmp_path):
    thresholds, statistics = tmp_path / "t.safetensors", tmp_path / "counts"
    files = ("-o", thresholds, "--statistics", statistics)
    command("calibrate", checkpoint, "--text", text, *SMALL, *files)
    for file, words in ((thresholds, "dropped in calibration"), (statistics, "40 neurons, silu")):
        code, out, err = command("info", file)
        assert code == 0, err
        assert words in out
        assert "{" not in out


def test_layers_are_listed_by_number_and_an_equal_share_once(command_json, tmp_path):
    model = models.make_model(num_hidden_layers=11)
    config = cats.calibrate(model, [models.make_ids()], target_sparsity=0.5)
    shares = dict.fromkeys(config.thresholds, 0.5)
    dataclasses.replace(config, realized_sparsity=shares).save(tmp_path / "equal.safetensors")
    shares["model.layers.10.mlp"] = 0.25
    dataclasses.replace(config, realized_sparsity=shares).save(tmp_path / "other.safetensors")
    cats.collect(model, [models.make_ids()]).save(tmp_path / "counts.bin")
    for file in ("equal.safetensors", "other.safetensors", "counts.bin"):
        report = command_json("info", tmp_path / file)
        assert [*report["MLPs"]] == [f"model.layers.{i}.mlp" for i in range(11)]
        rows = "".join(report["MLPs"].values())
        assert ("25.0% dropped" in rows) == (file == "other.safetensors")
        assert ("50.0% dropped" in rows) == (file == "other.safetensors")
        once = report[file].get("dropped in calibration")
        assert once == ("50.0% in each MLP" if file == "equal.safetensors" else None)


def test_kernels_that_are_not_built_name_the_command_of_the_clone(command_json, monkeypatch):
    assert "pip install" not in command_json("info")["backends of cats::gated_mlp"]["cpu"]
    monkeypatch.setattr(cats.ops, "backends", lambda: {"cpu": "not built"})
    line = command_json("info")["backends of cats::gated_mlp"]["cpu"]
    assert line.endswith(f"pip install -e {Path(__file__).parents[2]}")


def test_statistics_of_collect_are_described_whatever_their_name(command_json, tmp_path):
    model, ids = models.make_model(), models.make_ids()
    cats.collect(model, [ids], method="relu").save(tmp_path / "counts.bin")
    report = command_json("info", tmp_path / "counts.bin")
    assert report["counts.bin"]["method"] == "relu"
    assert report["counts.bin"]["calibration_tokens"] == ids.numel()
    assert len(report["MLPs"]) == len(cats.model.find_gated_mlps(model))


def test_file_of_something_else_is_no_model(command, text):
    code, _, err = command("info", text)
    assert code == 1
    assert "not a whole safetensors file" in err


@pytest.mark.parametrize("method", ["cats", "dense"])
def test_what_finetuning_wrote_is_described(
    command, command_json, checkpoint, text, tmp_path, method
):
    run = tmp_path / "run"
    data = ("--text", text, "--eval-text", f"same={text}")
    small = split("--block 32 --calibration-tokens 256 --steps 1 --rank 4")
    code, _, err = command("finetune", checkpoint, "-o", run, *data, *small, "--method", method)
    assert code == 0, err
    adapter = command_json("info", run / "adapter")
    assert adapter["adapter"]["rank"] == 4
    assert ("MLPs" in adapter) == (method == "cats")
    for path in (run, run / "history.jsonl"):
        history = command_json("info", path)
        assert history[path.name]["steps"] == "1 of 1"
        assert history[path.name]["complete"] == "yes"
        assert " > " in history["evaluations"]["same"]
    (run / "adapter" / "adapter_config.json").write_text("{}")
    code, _, err = command("info", run / "adapter")
    assert code == 1
    assert "not a LoRA adapter" in err
