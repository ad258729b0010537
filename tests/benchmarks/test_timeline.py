"""Stamps of a traced token, and what is made of them."""

import pytest
import torch
from transformers import LlamaConfig
from typer.testing import CliRunner

from cats.benchmarks.timeline import measure, moments
from cats.cli import app
from cats.errors import ConfigError, DataError
from cats.report import plots
from cats.report.timeline import panels, plot, table
from cats.results import EVENTS, LAUNCHES, append_results
from tests.models import make_ids, make_model
from tests.records import moment


def check_moments(found):
    """Each launch has its events, in order, and none ends before the one in front."""
    # a linear layer ends with its last weights
    missing = {("q, k, v", "last"), ("output projection", "last")}
    assert set(found) == {(launch, event) for launch in LAUNCHES for event in EVENTS} - missing
    assert all(low <= middle <= high for low, middle, high in found.values())
    for launch in LAUNCHES:
        assert found[launch, "start"][1] < found[launch, "input"][1] < found[launch, "end"][1]
    ends = [found[launch, "end"][2] for launch in LAUNCHES]
    assert ends == sorted(ends)
    assert ends[0] > 0


def test_moments_are_counted_from_the_end_of_the_layer_before():
    stamps = torch.zeros(4 * 3 + 3, 5, 8, 4, dtype=torch.int64)
    stamps[4, 2, 1, 3] = 10_000  # the first layer's MLP ends
    stamps[8, 0, 0, 3] = 30_000
    stamps[5, :2, 0, 1] = torch.tensor([11_000, 14_000])
    stamps[9, 3, 0, 1] = 30_500
    found = moments(stamps)
    # of the second layer 1, 1, 4, of the third .5
    assert found["q, k, v", "input"] == pytest.approx((0.75, 0.75, 2.25))
    assert found["MLP", "end"] == pytest.approx((20, 20, 20))
    assert ("attention", "start") not in found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_runs_the_launches_of_a_layer_one_behind_the_other():
    model = make_model(LlamaConfig, num_hidden_layers=4).to("cuda", torch.bfloat16)
    results = list(
        measure(model, make_ids(8), name="tiny", sparsities=[0, 0.5], context=20, commit="abc")
    )
    for sparsity in (0, 0.5):
        rows = [r for r in results if r.settings["sparsity"] == sparsity]
        names = [(r.settings["launch"], r.settings["event"]) for r in rows]
        times = [(r.low, r.value, r.high) for r in rows]
        check_moments(dict(zip(names, times, strict=True)))


def some_results():
    return [
        moment(
            float(4 * row + column), low=float(4 * row + column) - 0.5,
            high=float(4 * row + column) + 1, launch=launch, event=event,
        )
        for row, launch in enumerate(LAUNCHES)
        for column, event in enumerate(EVENTS)
    ]  # fmt: skip


def test_results_are_shown_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "r.jsonl", tmp_path / "p.svg"
    append_results(file, some_results())
    shown = CliRunner().invoke(app, ["bench", "results", "show", str(file)])
    assert shown.exit_code == 0, shown.output
    assert "CATS-50, context 96, on a GPU" in shown.stdout
    assert " 15.0 " in shown.stdout
    assert "14.5 .. 16.0" in shown.stdout
    drawn = CliRunner().invoke(app, ["bench", "results", "plot", str(file), "-o", str(picture)])
    assert drawn.exit_code == 0, drawn.output
    assert "output projection</text>" in picture.read_text()
    wrong = ["bench", "results", "plot", str(file), "-o", str(picture), "--prompt-length", "32"]
    assert isinstance(CliRunner().invoke(app, wrong).exception, ConfigError)


def test_launches_without_a_moment_are_left_out(tmp_path):
    pytest.importorskip("matplotlib")
    (panel,) = panels(r for r in some_results() if r.settings["launch"] != "attention")
    assert table(panel).rows[1] == ["attention", "", "", "", ""]
    plots.save(plot([panel]), tmp_path / "p.png")
    with pytest.raises(DataError, match="no result of `cats bench timeline`"):
        plot([])


def test_models_that_are_not_on_a_gpu_are_refused():
    model = make_model(LlamaConfig)
    with pytest.raises(ConfigError, match="CUDA device"):
        next(measure(model, make_ids(2), name="tiny", sparsities=[0], context=8))
