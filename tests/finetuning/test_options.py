import pytest

from cats.errors import ConfigError
from cats.finetuning import FinetuneOptions


def test_defaults_are_the_papers():
    options = FinetuneOptions()
    assert (options.rank, options.alpha, options.dropout) == (64, 16, 0.1)
    assert (options.learning_rate, options.weight_decay) == (1e-5, 0.01)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("rank", -1),
        ("dropout", 1.0),
        ("distillation", 1.5),
        ("weight_decay", -1.0),
        ("weight_decay", float("inf")),
    ],
)
def test_impossible_options_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        FinetuneOptions(**{name: value})


def test_distillation_is_refused_with_full_finetuning():
    with pytest.raises(ConfigError, match="dense model's own weights"):
        FinetuneOptions(full=True, distillation=0.5)


@pytest.mark.parametrize(("evaluate", "save", "log"), [(50, 100, 10), (2, 4, 2), (25, 0, 5)])
def test_a_log_falls_on_each_evaluation_and_checkpoint(evaluate, save, log):
    assert FinetuneOptions(evaluate_every=evaluate, save_every=save).log_every == log
