import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cats.cli import app
from cats.errors import ConfigError, DataError
from cats.report import plots, tokens
from cats.results import append_results
from tests.records import (
    first_token_time,
    launch_time,
    peak_memory,
    start_up_time,
    token_time,
)


@pytest.fixture
def results():
    """Two ways to generate, dense and at 50 %, as a run writes them."""
    checked = dict(kl=1e-9, kl_of_rounding=2e-9, same_choice=1.0, sparsity_error=0.0012)
    results = []
    for sparsity, value in ((0.0, 4.0), (0.5, 2.5)):
        for variant, check in (("stream", checked), ("generate", {})):
            row = dict(variant=variant, sparsity=sparsity)
            dropped = dict(realized_sparsity=sparsity, limit_ms=2.0 - sparsity)
            results.append(token_time(value, **row, **dropped, **check))
            results.append(first_token_time(10 * value, **row, dense_ms=40.0))
            results.append(start_up_time(1.5, **row, compilations=3))
    return results


def test_tables_show_every_variant_and_the_launches_of_the_last_run(results):
    old, new = (launch_time(1.0, kernel=name) for name in ("old", "new"))
    (panel,) = tokens.panels([results[0], old, *results, new])
    speed, costs, checks, step = tokens.tables(panel)
    assert len(speed.rows) == len(costs.rows) == 4
    assert [row[0] for row in step.rows] == ["new"]
    assert " ".join(speed.rows[0]) == "stream 0% 0.0% 250.0 4.00 0% 1.00 0 0.50"
    assert costs.columns[2:] == ["first, ms", "dense, ms", "start, s", "anew"]
    assert costs.rows[2] == ["stream", "50%", "25.0", "40.0", "1.5", "3"]
    # nothing checks what transformers generates
    assert checks.rows == [
        ["stream", target, "1.0e-09", "2.0e-09", "100%", "+0.12"] for target in ("0%", "50%")
    ]


def test_tables_fit_a_terminal_of_80_characters(results):
    long = [r.model_copy(update={"variant": "generate_compiled"}) for r in results]
    peak = peak_memory(12_345e6, over_dense_weights=0.0123)
    (panel,) = tokens.panels([*results, *long, peak])
    console = Console(width=80, record=True, file=io.StringIO())
    for table in tokens.tables(panel):
        console.print(table.rich())
    shown = console.export_text()
    assert "…" not in shown
    # dense and sparse: speed, costs and check
    assert shown.count("generate_compiled") >= 4


def test_a_run_that_was_cut_is_shown_as_far_as_it_came(results):
    (panel,) = tokens.panels(results[:1])
    assert [len(table.rows) for table in tokens.tables(panel)] == [1, 1, 1]
    (panel,) = tokens.panels([launch_time(1.0)])
    assert [len(table.rows) for table in tokens.tables(panel)] == [0, 0, 1]
    with pytest.raises(DataError, match="no result"):
        tokens.panels([])


def test_plot_draws_every_variant_and_the_limit(results, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "decode.svg"
    plots.save(tokens.plot(tokens.panels(results)), picture)
    text = picture.read_text()
    for label in ("stream", "generate", "memory limit", "tokens per second"):
        assert f"{label}</text>" in text


def test_plot_has_one_limit_per_target_the_highest_of_any_run(results):
    pytest.importorskip("matplotlib")
    times = [r for r in results if r.quantity == "time"]
    slower = [r.model_copy(update={"variant": "other", "limit_ms": 2 * r.limit_ms}) for r in times]
    limits = []
    for measured in (results, [*results, *slower]):
        (axis,) = tokens.plot(tokens.panels(measured)).axes
        (line,) = [line for line in axis.get_lines() if line.get_label() == "memory limit"]
        limits.append(line.get_xydata().tolist())
    assert limits[0] == limits[1] == [[0.0, 500.0], [0.5, pytest.approx(1e3 / 1.5)]]


def test_bars_of_a_rate_are_those_of_its_times(results):
    pytest.importorskip("matplotlib")
    steps = [token_time(4.0, low=2.0, high=5.0, sparsity=s) for s in (0.0, 0.5)]
    (axis,) = tokens.plot(tokens.panels(steps)).axes
    (bars,) = axis.collections
    assert bars.get_segments()[0][:, 1].tolist() == [200.0, 500.0]


def test_command_shows_and_plots_a_file(results, tmp_path):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "r.jsonl", tmp_path / "p.svg"
    append_results(file, results)

    def invoke(*arguments):
        return CliRunner().invoke(app, ["bench", "results", *map(str, arguments)])

    shown = invoke("show", file)
    assert "generate" in shown.stdout
    assert "own KL: of these modules" in " ".join(shown.stdout.split())
    plotted = invoke("plot", file, "-o", picture)
    assert plotted.exit_code == 0, plotted.output
    assert picture.exists()
    assert invoke("plot", file, "-o", picture, "--prompt-length", 8).exit_code == 0
    other = invoke("plot", file, "-o", picture, "--prompt-length", 99999)
    assert isinstance(other.exception, DataError)
    assert isinstance(invoke("plot", file, "-o", tmp_path / "p.doc").exception, ConfigError)
    assert isinstance(invoke("plot", file, "-o", picture, "--shape", "8x8").exception, ConfigError)
