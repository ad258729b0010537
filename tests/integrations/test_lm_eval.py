import json
import sys

import pytest

import cats
from cats import smollm2
from cats.cli import main
from tests import models
from tests.evaluation.conftest import models_data

pytest.importorskip("lm_eval", reason="needs the extra eval")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture
def config(tmp_path):
    """A folder with a task of the harness that reads local data."""
    data = models_data(tmp_path / "data") / "piqa" / "validation.parquet"
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "colours.yaml").write_text(
        "task: colours\ndataset_path: parquet\noutput_type: multiple_choice\n"
        f"dataset_kwargs:\n  data_files:\n    validation: {data}\n"
        "validation_split: validation\ndoc_to_text: goal\ndoc_to_target: label\n"
        'doc_to_choice: "{{[sol1, sol2]}}"\nmetric_list:\n  - metric: acc\n'
    )
    return folder


def run(monkeypatch, tmp_path, config, model, model_args):
    output = tmp_path / "out"
    arguments = ["--model", model, "--model_args", model_args, "--tasks", "colours"]
    arguments += ["--include_path", str(config), "--output_path", str(output)]
    arguments += ["--log_samples", "--batch_size", "4", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["cats", "lm-eval", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    (samples,) = output.rglob("samples_*.jsonl")
    return [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]


def test_the_type_cats_answers_with_the_thresholds(monkeypatch, tmp_path, config):
    model = models.make_model()
    folder = tmp_path / "dense"
    model.save_pretrained(folder)
    models.make_tokenizer().save_pretrained(folder)
    thresholds = tmp_path / "cats.safetensors"
    cats.calibrate(model, [models.make_ids()], target_sparsity=0.9).save(thresholds)

    def answers(name, model, model_args):
        return run(monkeypatch, tmp_path / name, config, model, model_args)

    dense = answers("1", "hf", f"pretrained={folder}")
    sparse = answers("2", "cats", f"pretrained={folder},thresholds={thresholds}")
    assert len(dense) == len(sparse) == 8
    assert all(a != b for a, b in zip(dense, sparse, strict=True))

    cats.from_pretrained(folder, thresholds=thresholds).save_pretrained(tmp_path / "sparse")
    models.make_tokenizer().save_pretrained(tmp_path / "sparse")
    stored = answers("3", "cats", f"pretrained={tmp_path / 'sparse'}")
    assert stored == sparse

    monkeypatch.setattr(smollm2, "checkpoint", lambda: folder)
    built_in = answers("4", "cats", f"pretrained=smollm2,thresholds={thresholds}")
    assert built_in == sparse


def test_a_dense_checkpoint_without_thresholds_is_an_error(tmp_path, monkeypatch, capsys, config):
    models.make_model().save_pretrained(tmp_path / "dense")
    models.make_tokenizer().save_pretrained(tmp_path / "dense")
    arguments = ["--model", "cats", "--model_args", f"pretrained={tmp_path / 'dense'}"]
    arguments += ["--tasks", "colours", "--include_path", str(config)]
    monkeypatch.setattr(sys, "argv", ["cats", "lm-eval", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert "dense checkpoint" in capsys.readouterr().err


def test_help_tells_of_the_model_type(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cats", "lm-eval", "--help"])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr().out
    ours, _, theirs = printed.partition("usage: lm-eval")
    assert "--model cats" in ours
    assert "pretrained=MODEL,thresholds=FILE" in ours
    assert "Run the evaluation harness" in theirs


def test_model_that_is_not_named_is_an_error(monkeypatch, capsys):
    arguments = ["cats", "lm-eval", "--model", "cats", "--tasks", "piqa"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert "pretrained=" in capsys.readouterr().err


def test_options_of_the_hub_reach_every_file(tmp_path):
    from lm_eval.api.registry import get_model

    from cats.integrations import lm_eval

    lm_eval.register()
    for revision, target in (("v2", 0.8), ("v3", 0.2)):
        models.fill_hub_cache(tmp_path, revision=revision, subfolder="sub", target=target)
        hub = dict(subfolder="sub", cache_dir=str(tmp_path), local_files_only=True)
        loaded = get_model("cats")(pretrained="org/model", revision=revision, device="cpu", **hub)
        assert loaded.model.config.cats["target_sparsity"] == target
        assert loaded.tokenizer.eos_token == "<eos>"
