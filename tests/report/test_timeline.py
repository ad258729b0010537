import itertools

import pytest
from typer.testing import CliRunner

from cats.cli import app
from cats.errors import ConfigError, DataError
from cats.report import plots
from cats.report.timeline import panels, plot, table
from cats.results import EVENTS, LAUNCHES, append_results
from tests.records import moment


def some_results():
    names = itertools.product(LAUNCHES, EVENTS)
    return [
        moment(float(time), low=time - 0.5, high=time + 1.0, launch=launch, event=event)
        for time, (launch, event) in enumerate(names)
    ]


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
