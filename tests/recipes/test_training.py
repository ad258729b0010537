import pytest

from cats.errors import ConfigError
from cats.finetuning import FinetuneOptions, finetune
from cats.model import is_sparse
from cats.recipes import TrainingData, prepare_
from cats.recipes.training import changed_options

OPTIONS = FinetuneOptions(steps=2, batch_size=4, evaluate_every=2, save_every=0, rank=2)


@pytest.fixture
def data(tmp_path, text):
    path = tmp_path / "text.txt"
    path.write_text(text)
    return TrainingData(text=(str(path),), eval_text=(f"same={path}",), block=32)


@pytest.mark.parametrize("method", [None, "relu", "dense"])
def test_a_dense_model_is_made_sparse_by_the_method(model, tokenizer, data, progress, method):
    ready = prepare_(model, tokenizer, data, OPTIONS, method=method, progress=progress)
    assert is_sparse(model) == (method != "dense")
    assert (ready.calibration is None) == (method == "dense")
    assert len(progress.tracked) == (method != "dense")
    assert list(ready.evaluations) == ["same"]
    assert ready.pairs == {}


def test_epochs_become_steps_of_whole_batches(model, tokenizer, data):
    ready = prepare_(model, tokenizer, data, OPTIONS, epochs=2)
    assert ready.options.steps == 2 * (len(ready.train) // 4)
    with pytest.raises(ConfigError, match="must be positive"):
        prepare_(model, tokenizer, data, OPTIONS, epochs=0)


def test_text_to_calibrate_on_is_refused_where_thresholds_stay(model, tokenizer, data):
    prepare_(model, tokenizer, data, OPTIONS)
    data.calibration_text = data.text
    with pytest.raises(ConfigError, match="has no use"):
        prepare_(model, tokenizer, data, OPTIONS)


def test_what_differs_from_the_run_in_a_folder_is_named(model, tokenizer, data, tmp_path):
    run = tmp_path / "run"
    assert changed_options(run, OPTIONS) == {}
    ready = prepare_(model, tokenizer, data, OPTIONS)
    finetune(
        model,
        ready.train,
        tokenizer=tokenizer,
        output=run,
        options=ready.options,
        evaluations=ready.evaluations,
        calibration=ready.calibration,
    )
    assert changed_options(run, OPTIONS) == {}
    other = FinetuneOptions(steps=3, batch_size=2, evaluate_every=2, save_every=0, rank=2)
    assert changed_options(run, other) == {"steps": (2, 3), "batch_size": (4, 2)}
    assert changed_options(run, other, without_steps=True) == {"batch_size": (4, 2)}
