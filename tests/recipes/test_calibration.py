import pytest
import torch

import cats
from cats.errors import ConfigError, DataError
from cats.metrics import perplexity_and_sparsity
from cats.model import is_sparse
from cats.recipes import calibrate
from tests import models

BLOCKS, HELD_OUT = models.make_ids(rows=8), models.make_ids(rows=4, seed=1)


def test_thresholds_are_those_of_calibrate_and_their_cost_is_measured(model, progress):
    expected = cats.calibrate(model, BLOCKS.split(4), target_sparsity=0.7)
    calibrated = calibrate(model, BLOCKS, HELD_OUT, target_sparsity=0.7, progress=progress)
    assert calibrated.config.thresholds == expected.thresholds
    assert calibrated.config.calibration_hash == expected.calibration_hash
    assert calibrated.held_out_tokens == HELD_OUT.numel()
    assert is_sparse(model)
    perplexity, realized = perplexity_and_sparsity(model, [HELD_OUT])
    assert calibrated.perplexity_sparse == pytest.approx(perplexity)
    assert calibrated.realized_sparsity == realized
    assert calibrated.perplexity_dense == pytest.approx(
        cats.metrics.perplexity(cats.densify_(model), [HELD_OUT])
    )
    assert progress.tracked == [
        ("calibrating", 2),
        ("dense perplexity", 1),
        ("sparse perplexity", 1),
    ]


def test_loss_is_kept(model):
    calibrated = calibrate(model, BLOCKS, HELD_OUT, max_loss=0.02)
    assert calibrated.perplexity_sparse <= 1.02 * calibrated.perplexity_dense
    assert calibrated.config.target_sparsity >= 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "relu", "target_sparsity": 0.5}, "no goal to choose"),
        ({"target_sparsity": 0.5, "max_loss": 0.02}, "leave out"),
        ({"target_sparsity": 50}, "inside"),
        ({"target_sparsity": 0.5, "target_bytes": 0.5}, "two goals"),
        ({"target_bytes": 50}, "inside"),
        ({"target_bytes": 0.2}, "gate is read whole"),
        ({"method": "cascade", "target_sparsity": 0.5}, "several masks"),
        ({"method": "cats", "attention": True}, "leaves attention"),
        ({"method": "magic"}, "magic"),
    ],
)
def test_options_that_contradict_are_refused_before_anything_is_counted(model, options, message):
    with pytest.raises(ConfigError, match=message):
        calibrate(model, BLOCKS, HELD_OUT, **options)
    assert not is_sparse(model)


def test_split_is_searched_saved_and_continued(model, progress, tmp_path):
    path, options = tmp_path / "s.safetensors", dict(method="cascade", target_bytes=0.6)
    first = calibrate(model, BLOCKS, HELD_OUT, statistics=path, progress=progress, **options)
    assert first.config.target_bytes == 0.6
    assert first.bytes_read == pytest.approx(0.6, abs=0.06)
    assert [text for text, _ in progress.tracked][:2] == [
        "inputs and gradients",
        "masks of cascade",
    ]
    before = path.read_bytes()
    progress.tracked.clear()
    cats.densify_(model)
    again = calibrate(model, BLOCKS, HELD_OUT, statistics=path, progress=progress, **options)
    assert again.config == first.config
    assert path.read_bytes() == before
    # nothing is left of passes and layers
    assert progress.tracked[:2] == [("inputs and gradients", 0), ("masks of cascade", 0)]
    cats.densify_(model)
    teal = calibrate(model, BLOCKS, HELD_OUT, statistics=path, method="teal")
    assert teal.config.target_bytes == 0.5
    with pytest.raises(DataError, match="another text"):
        calibrate(cats.densify_(model), BLOCKS + 1, HELD_OUT, statistics=path, **options)


def test_loss_of_a_split_is_kept(model):
    calibrated = calibrate(model, BLOCKS, HELD_OUT, max_loss=0.02, method="two-stage")
    assert calibrated.perplexity_sparse <= 1.02 * calibrated.perplexity_dense
    assert calibrated.config.target_bytes < 1


def test_speed_is_met_by_measured_costs(model, tmp_path):
    from cats.benchmarks.costs import measure

    results = list(measure(model, name="tiny", rounds=2))
    assert [r.quantity for r in results] == ["token"] + ["mlps"] * 10
    # a device on which masks save as much as their bytes
    settled = []
    for r in results:
        value = 10.0
        if r.quantity == "mlps":
            value = 6.0 - {"none": 0, "gate": 2, "rows": 4, "columns": 2}[r.mask] * r.dropped
        settled.append(r.model_copy(update={"value": value}))
    path = tmp_path / "costs.jsonl"
    path.write_text("".join(r.to_json() + "\n" for r in settled))
    found = calibrate(model, BLOCKS, HELD_OUT, speed=1.25, costs=path)
    assert found.config.target_sparsity == 0.5  # 2 of 10 ms
    cats.densify_(model)
    found = calibrate(model, BLOCKS, HELD_OUT, speed=1.25, costs=path, method="cascade")
    # two of six milliseconds are not needed
    assert found.config.target_bytes == pytest.approx(2 / 3, abs=0.05)
    cats.densify_(model)
    with pytest.raises(ConfigError, match=r"cannot be met: 99 % sparsity gives 1\.66 times"):
        calibrate(model, BLOCKS, HELD_OUT, speed=3, costs=path)
    with pytest.raises(ConfigError, match="--costs"):
        calibrate(model, BLOCKS, HELD_OUT, speed=1.2)
    with pytest.raises(ConfigError, match="no kernel skips 'up'"):
        calibrate(model, BLOCKS, HELD_OUT, speed=1.2, costs=path, method="teal")
    torch.manual_seed(1)
    with pytest.raises(DataError, match="not of this model"):
        calibrate(models.make_model(), BLOCKS, HELD_OUT, speed=1.2, costs=path)
