import pytest
from typer.testing import CliRunner

from cats.cli import app
from cats.errors import DataError
from cats.report import mlp
from cats.results import append_results
from tests.records import mlp_time


@pytest.fixture
def results():
    return [
        mlp_time(100.0, variant="dense_eager", sparsity=0.0),
        mlp_time(90.0, variant="dense_merged", sparsity=0.0),
        mlp_time(80.0, variant="reference", sparsity=0.0),
        mlp_time(40.0, variant="reference", sparsity=0.5, low=38.0, high=44.0),
        mlp_time(10.0, variant="paper", sparsity=0.0),
    ]


def test_table_shows_all_dense_baselines_and_the_fastest_counts(results):
    (panel,) = mlp.panels(results)
    # the paper's kernel is not ours, and no dense MLP either
    assert [*panel.dense] == ["dense_eager", "dense_merged", "reference at 0"]
    assert panel.best_dense == 80.0
    table = mlp.table(panel)
    assert table.caption.startswith("best dense 80.0 us of: dense_eager 100.0, dense_merged 90.0")
    assert table.rows[-1] == ["reference", "50%", "40.0", "38.0-44.0", "40.0", "1.00", "2.00"]


def test_run_without_a_dense_mlp_compares_with_none():
    (panel,) = mlp.panels([mlp_time(40.0, variant="cuda", sparsity=0.5)])
    table = mlp.table(panel)
    assert table.rows[0][-1] == ""
    assert table.caption == "no dense MLP was timed in this run"


def test_plot_is_made_from_the_file_alone(results, tmp_path):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "r.jsonl", tmp_path / "plot.svg"
    append_results(file, results)

    def invoke(*more):
        command = ["bench", "results", "plot", str(file), "-o", str(picture), *more]
        return CliRunner().invoke(app, command)

    assert invoke().exit_code == 0
    for label in ("dense_eager", "reference", "memory limit", "us per call"):
        assert f"{label}</text>" in picture.read_text()
    assert invoke("--shape", "64x128").exit_code == 0
    assert isinstance(invoke("--shape", "8x8").exception, DataError)


def test_results_that_are_not_there_are_an_error():
    with pytest.raises(DataError, match="no result"):
        mlp.panels([])
    between = mlp.panels([mlp_time(40.0, neighbour="rmsnorm")])
    with pytest.raises(DataError, match="back to back"):
        mlp.summary(between)
