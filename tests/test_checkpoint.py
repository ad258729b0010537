import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import cats
from cats.errors import ConfigError, FormatError, ModelMismatchError, StorageError
from tests import models


@pytest.fixture
def sparse():
    model = models.make_model()
    return cats.sparsify_(model, cats.calibrate(model, [models.make_ids()], target_sparsity=0.5))


@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_saved_model_gives_equal_logits(sparse, tmp_path, shard):
    sparse.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len([*tmp_path.glob("*.safetensors")]) > 1) == (shard == "10KB")
    loaded = cats.from_pretrained(tmp_path)
    ids = models.make_ids(seed=1)
    assert torch.equal(models.logits(loaded, ids), models.logits(sparse, ids))


def test_plain_transformers_loads_the_dense_model(sparse, tmp_path):
    sparse.save_pretrained(tmp_path)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert len(info["unexpected_keys"]) == 2
    ids = models.make_ids(seed=1)
    assert torch.equal(models.logits(plain, ids), models.logits(cats.densify_(sparse), ids))


def test_config_json_holds_the_small_block(sparse, tmp_path):
    sparse.save_pretrained(tmp_path)
    block = json.loads((tmp_path / "config.json").read_text())["cats"]
    assert block.keys() == {
        "version", "method", "router", "target_sparsity", "realized_sparsity",
        "calibration_tokens", "calibration_hash",
    }  # fmt: skip
    assert block["version"] == 1
    assert block["calibration_tokens"] == 128


def test_dense_checkpoint_is_refused(tmp_path):
    models.make_model().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="dense"):
        cats.from_pretrained(tmp_path)


def test_thresholds_of_another_model_are_refused(sparse, tmp_path):
    config = cats.calibrate(cats.densify_(sparse), [models.make_ids()], target_sparsity=0.5)
    models.make_model().save_pretrained(tmp_path)
    with pytest.raises(ModelMismatchError):
        cats.from_pretrained(tmp_path, thresholds=config)


def test_thresholds_file_applies_in_another_dtype(sparse, tmp_path):
    dense = cats.densify_(sparse)
    config = cats.calibrate(dense, [models.make_ids()], target_sparsity=0.5)
    dense.save_pretrained(tmp_path)
    config.save(tmp_path / "t.safetensors")
    model = cats.from_pretrained(
        tmp_path, thresholds=tmp_path / "t.safetensors", dtype=torch.bfloat16
    )
    assert model.dtype == torch.bfloat16
    assert model.model.layers[1].mlp.act_fn.threshold == config.thresholds["model.layers.1.mlp"]


def test_newer_checkpoint_is_refused(sparse, tmp_path):
    sparse.config.cats["version"] = 2
    sparse.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="upgrade"):
        cats.from_pretrained(tmp_path)


def test_truncated_weights_and_unknown_folder_are_refused(sparse, tmp_path):
    sparse.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises((FormatError, StorageError)):
        cats.from_pretrained(tmp_path)
    with pytest.raises(StorageError):
        cats.from_pretrained(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "message"), [("adapter_config.json", "load_adapter"), ("history.jsonl", "merged/")]
)
def test_what_finetuning_writes_beside_a_model_is_named(tmp_path, name, message):
    (tmp_path / name).write_text("{}")
    with pytest.raises(StorageError, match=message):
        cats.from_pretrained(tmp_path)


def test_weights_of_another_size_are_refused(tmp_path):
    models.make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(FormatError, match="other sizes"):
        cats.checkpoint.load_dense(tmp_path)
