import dataclasses
import math

import pytest
import torch

from cats import CatsConfig
from cats.errors import ConfigError, FormatError
from cats.storage import save_tensors

CONFIG = CatsConfig(
    method="cats",
    target_sparsity=0.5,
    tensors={
        "model.layers.0.mlp": {"threshold": torch.tensor(0.1234567)},
        "model.layers.1.mlp": {"threshold": torch.rand(5), "correction": torch.rand(5)},
    },
    realized_sparsity={"model.layers.0.mlp": 0.49, "model.layers.1.mlp": 0.5},
    calibration_tokens=1234,
    calibration_hash="00ff",
    fingerprints={"model.layers.0.mlp": torch.rand(8), "model.layers.1.mlp": torch.rand(8)},
)


def test_config_comes_back_from_its_file(tmp_path):
    CONFIG.save(tmp_path / "t.safetensors")
    loaded = CatsConfig.load(tmp_path / "t.safetensors")
    assert loaded.to_dict() == CONFIG.to_dict()
    for mlp, tensors in CONFIG.tensors.items():
        assert loaded.tensors[mlp].keys() == tensors.keys()
        assert all(torch.equal(loaded.tensors[mlp][n], t) for n, t in tensors.items())
        assert torch.equal(loaded.fingerprints[mlp], CONFIG.fingerprints[mlp])


@pytest.mark.parametrize("target", [0, 1, -0.1, 1.5, math.nan, math.inf])
def test_target_outside_the_open_interval_is_refused(target):
    with pytest.raises(ConfigError, match="inside"):
        dataclasses.replace(CONFIG, target_sparsity=target)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"mlp": {}},
        {"mlp": {"other": torch.tensor(0.1)}},
        {"mlp": {"threshold": torch.tensor(-0.1)}},
        {"mlp": {"threshold": torch.tensor(math.nan)}},
        {"mlp": {"threshold": torch.ones(2, 2)}},
        {"mlp": {"threshold": torch.tensor(0.1, dtype=torch.bfloat16)}},
    ],
)
def test_impossible_thresholds_are_refused(tensors):
    with pytest.raises(ConfigError):
        dataclasses.replace(CONFIG, tensors=tensors)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIG.method = "relu"


def _write(path, *, without=(), tensors=None, **changes):
    block = {"kind": "thresholds", **CONFIG.to_dict()} | changes
    block = {name: value for name, value in block.items() if name not in without}
    if tensors is None:
        tensors = {f"{mlp}.threshold": t for mlp, t in CONFIG.thresholds.items()}
    save_tensors(path, tensors, block)
    return path


@pytest.mark.parametrize("name", ["method", "router", "target_sparsity", "realized_sparsity"])
def test_file_that_lacks_a_field_is_a_format_error(tmp_path, name):
    with pytest.raises(FormatError, match=name):
        CatsConfig.load(_write(tmp_path / "t.safetensors", without=[name]))


def test_statistics_file_is_no_thresholds_file(tmp_path):
    with pytest.raises(FormatError, match="expected thresholds"):
        CatsConfig.load(_write(tmp_path / "t.safetensors", kind="statistics"))


def test_file_of_a_newer_release_is_a_format_error(tmp_path):
    with pytest.raises(FormatError, match="upgrade"):
        CatsConfig.load(_write(tmp_path / "t.safetensors", version=3))


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"model.layers.0.mlp.threshold": torch.tensor(0.1)},
        {"model.layers.0.mlp.fingerprint": torch.rand(8)},
        {f"model.layers.{i}.mlp.threshold": torch.tensor(math.nan) for i in range(2)},
    ],
    ids=["no tensors", "one MLP of two", "fingerprints only", "NaN"],
)
def test_file_without_all_its_thresholds_is_a_format_error(tmp_path, tensors):
    with pytest.raises(FormatError):
        CatsConfig.load(_write(tmp_path / "t.safetensors", tensors=tensors))


def test_file_with_a_damaged_block_is_a_format_error(tmp_path):
    with pytest.raises(FormatError):
        CatsConfig.load(_write(tmp_path / "t.safetensors", realized_sparsity=3))
    with pytest.raises(FormatError):
        CatsConfig.load(_write(tmp_path / "t.safetensors", target_sparsity="half"))


def test_configs_are_equal_where_their_tensors_are():
    def config(threshold):
        tensors = {"mlp": {"threshold": torch.full((3,), threshold)}}
        return CatsConfig(method="cats", target_sparsity=0.5, tensors=tensors)

    assert config(0.25) == config(0.25)
    assert config(0.25) != config(0.5)
    assert config(0.25) != "cats"
