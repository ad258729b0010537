import pytest

import cats
from cats.errors import ConfigError
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
        ({"method": "relu", "target_sparsity": 0.5}, "no sparsity to choose"),
        ({"target_sparsity": 0.5, "max_loss": 0.02}, "leave out"),
        ({"target_sparsity": 50}, "inside"),
        ({"method": "magic"}, "magic"),
    ],
)
def test_options_that_contradict_are_refused_before_anything_is_counted(model, options, message):
    with pytest.raises(ConfigError, match=message):
        calibrate(model, BLOCKS, HELD_OUT, **options)
    assert not is_sparse(model)
