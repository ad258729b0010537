import pytest
from typer.testing import CliRunner

from cats.cli import app
from cats.errors import DataError, FormatError, StorageError
from cats.results import append_results, join_results, read_results, run_of
from tests.records import mlp_time


def run(time):
    return {"device": "a GPU", "time": str(time)}


def test_what_is_appended_is_read_back_in_order(tmp_path):
    path = tmp_path / "folder" / "results.jsonl"
    first, second, third = (mlp_time(float(i)) for i in range(3))
    append_results(path, [first, second])
    append_results(path, [third])
    assert read_results(path) == [first, second, third]


def test_files_that_cannot_be_used_are_storage_errors(tmp_path):
    with pytest.raises(StorageError, match="cannot be read"):
        read_results(tmp_path / "absent.jsonl")
    with pytest.raises(StorageError, match="cannot be written"):
        append_results(tmp_path, [mlp_time(1.5)])
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(StorageError, match="no UTF-8 text"):
        read_results(tmp_path / "binary")


def test_joined_results_stand_once_run_by_run(tmp_path):
    first = [mlp_time(1.5, sparsity=s, environment=run(1)) for s in (0.5, 0.7)]
    second = [mlp_time(9.0, sparsity=0.5, environment=run(2))]
    append_results(tmp_path / "a", first[:1])
    append_results(tmp_path / "b", [*second, *first])
    joined = join_results([tmp_path / "a", tmp_path / "b"])
    assert joined == [*first, *second]
    assert [run_of(result) for result in joined] == [run_of(first[0])] * 2 + [run_of(second[0])]
    append_results(tmp_path / "joined", joined)
    assert join_results([tmp_path / "joined", tmp_path / "a"]) == joined


def test_results_that_do_not_agree_are_not_joined(tmp_path):
    one = mlp_time(1.5, environment=run(1))
    append_results(tmp_path / "a", [one])
    for name, other in {
        "b": one.model_copy(update={"value": 2.0}),
        "c": one.model_copy(update={"limit_us": 9.0}),
    }.items():
        append_results(tmp_path / name, [other])
        with pytest.raises(DataError, match="of the same run and settings"):
            join_results([tmp_path / "a", tmp_path / name])
    (tmp_path / "empty").write_text("")
    with pytest.raises(DataError, match="no results"):
        join_results([tmp_path / "empty"])
    (tmp_path / "half").write_text(one.to_json()[:40])
    with pytest.raises(FormatError, match="line 1"):
        join_results([tmp_path / "a", tmp_path / "half"])


def test_files_are_joined_by_a_command(tmp_path):
    append_results(tmp_path / "a.jsonl", [mlp_time(1.5, environment=run(1))])
    append_results(tmp_path / "b.jsonl", [mlp_time(1.5, environment=run(2))])
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "a.jsonl")]
    outcome = CliRunner().invoke(
        app, ["bench", "results", "join", *files, "-o", str(tmp_path / "all.jsonl")]
    )
    assert outcome.exit_code == 0, outcome.output
    assert "2 results of 2 runs" in " ".join(outcome.output.split())
    assert len(read_results(tmp_path / "all.jsonl")) == 2
