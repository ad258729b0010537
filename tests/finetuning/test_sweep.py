import pytest
import torch

from cats.errors import ConfigError, TrainingError
from cats.finetuning import Blocks, FinetuneOptions
from cats.finetuning.sweep import Run, grid, sweep
from tests import models

OPTIONS = FinetuneOptions(steps=2, batch_size=4, rank=4, evaluate_every=1)


@pytest.fixture
def run(make, ids, tokenizer, tmp_path):
    def run(runs, model=None, options=OPTIONS, **kwargs):
        return dict(
            sweep(
                model or make("dense"),
                Blocks(ids[:16]),
                runs=runs,
                tokenizer=tokenizer,
                folder=tmp_path / "sweep",
                options=options,
                calibration=ids[:16],
                evaluations={"held out": Blocks(ids[16:])},
                **kwargs,
            )
        )

    return run


def test_grid_leaves_out_what_has_no_meaning():
    runs = grid(["dense", "cats-50", "relu"], [0.1], [0.0, 0.5], [0, 2])
    assert [run.name for run in runs] == [
        "dense-lr0.1",
        "cats-50-lr0.1",
        "cats-50-lr0.1-recalibrate2",
        "cats-50-lr0.1-distill0.5",
        "cats-50-lr0.1-distill0.5-recalibrate2",
        "relu-lr0.1",
        "relu-lr0.1-distill0.5",
    ]


@pytest.mark.parametrize("method", ["cats", "cats-0", "cats-100", "teal-50"])
def test_unknown_methods_are_refused(method):
    with pytest.raises(ConfigError, match="no method"):
        grid([method], [0.1])


def test_every_run_starts_from_the_same_weights(run, make, ids):
    model = make("dense")
    runs = grid(["cats-50", "dense", "cats-70"], [1e-2, 1e-3])
    results = run(runs, model=model)
    assert [*results] == runs
    for method in ("cats-50", "dense", "cats-70"):
        first, second = (results[Run(method, lr)].points[0] for lr in (1e-2, 1e-3))
        assert first == second
    assert results[Run("cats-70", 1e-2)].points[0].sparsity > 0.6
    assert torch.equal(models.logits(model, ids), models.logits(make("dense"), ids))


def test_finished_runs_are_not_run_again(run):
    runs = [Run("cats-50", 1e-2), Run("relu", 1e-2)]
    first = run(runs[:1])
    steps = []
    again = run(runs, on_step=lambda run, step: steps.append(run))
    assert set(steps) == {runs[1]}
    assert again[runs[0]] == first[runs[0]]
    with pytest.raises(ConfigError, match="other settings"):
        run(runs, options=FinetuneOptions(steps=3, batch_size=4, rank=4, evaluate_every=1))


def test_impossible_option_of_the_last_run_is_refused_before_the_first(run, tmp_path):
    with pytest.raises(ConfigError, match="learning_rate"):
        run(grid(["dense"], [1e-2, -1.0]))
    assert not (tmp_path / "sweep").exists()


def test_run_that_diverges_does_not_end_the_sweep(run, make, tmp_path):
    model = make("dense")

    def poison(run, step):
        if run.method == "cats-50":
            model.model.norm.weight.data.fill_(torch.nan)

    results = run(grid(["cats-50"], [1e-2]), model=model, on_step=poison)
    assert isinstance(results[Run("cats-50", 1e-2)], TrainingError)
