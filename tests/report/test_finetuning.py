import pytest

from cats.errors import DataError
from cats.history import History, Point, best_runs, recovered
from cats.report import plots
from cats.report.finetuning import curves


def make(method, losses, target=None, distillation=0.0, learning_rate=0.1, data="c4"):
    settings = {
        "run": f"{method}-{learning_rate}",
        "method": method,
        "target_sparsity": target,
        "options": {"distillation": distillation, "learning_rate": learning_rate},
        "train": data,
    }
    points = [Point(step=i, tokens=i * 10, losses={"c4": x}) for i, x in enumerate(losses)]
    return History(settings=settings, points=points)


def test_loss_is_counted_against_the_best_dense():
    cats = make("cats", [3.4, 3.1], 0.5)
    dense = [make("dense", [3.0, 2.9]), make("dense", [3.0, 3.2])]
    assert recovered(cats, [cats, *dense], "c4") == pytest.approx(0.6)
    assert recovered(cats, [cats], "c4") is None
    assert recovered(dense[0], dense, "c4") is None


def test_best_learning_rate_stands_for_a_method():
    runs = {
        "a": make("cats", [3.4, 3.1], 0.5),
        "b": make("cats", [3.4, 3.0], 0.5, learning_rate=0.2),
        "c": make("cats", [3.9, 3.5], 0.7),
        "d": make("cats", [3.4, 3.2], 0.5, distillation=0.5),
        "e": make("cats", [3.4, 3.3], 0.5, data="wiki"),
    }
    assert [*best_runs(runs)] == ["b", "c", "d", "e"]


def test_figure_names_runs_and_texts():
    pytest.importorskip("matplotlib")
    svg = plots.svg(curves({"cats-50": make("cats", [3.4, 3.1], 0.5)}), "curves")
    assert svg.startswith("<svg")
    for word in ("cats-50", "c4", "steps", "tokens"):
        assert f"{word}</text>" in svg
    assert "0.5</text>" not in svg, "steps are whole"
    with pytest.raises(DataError, match="no evaluation"):
        curves({"x": History(settings={})})


def test_run_that_starts_far_above_leaves_the_others_room():
    pytest.importorskip("matplotlib")
    shown = curves({"cats": make("cats", [3.5, 3.2]), "relu": make("relu", [9.0, 3.6])})
    low, high = shown.axes[0].get_ylim()
    assert low < 3.2
    assert 3.6 < high < 4
