import dataclasses
import json

import pytest
from typer.testing import CliRunner

from cats import results
from cats.cli import app
from cats.errors import DataError, FormatError, StorageError
from cats.results import Result, append_results, environment, join_results, read_results, run_of


def make_result(**changes: object) -> Result:
    result = Result(
        benchmark="mlp", quantity="time", value=1.5, unit="us", low=1.4, high=1.7, samples=9,
        settings={"dtype": "bfloat16", "sparsity": 0.5}, environment=environment("cpu"),
    )  # fmt: skip
    return dataclasses.replace(result, **changes)


def test_what_is_appended_is_read_back_in_order(tmp_path):
    path = tmp_path / "folder" / "results.jsonl"
    first, second, third = (make_result(value=float(i)) for i in range(3))
    append_results(path, [first, second])
    append_results(path, [third])
    assert read_results(path) == [first, second, third]


def test_environment_names_device_versions_and_sources():
    found = environment("cpu")
    assert found["device"]
    assert found["threads"] >= 1
    assert found["version_torch"]
    assert len(found["kernel_sources"]) == 64
    assert json.loads(json.dumps(found)) == found


def test_source_hash_follows_the_sources(tmp_path, monkeypatch):
    package = tmp_path / "cats"
    (package / "ops").mkdir(parents=True)
    source = package / "ops" / "kernel.cu"
    monkeypatch.setattr(results, "__file__", str(package / "results.py"))
    hashes = []
    for text in ("a", "b", "a"):
        source.write_text(text)
        hashes.append(results.kernel_source_hash.__wrapped__())
    assert hashes[0] == hashes[2] != hashes[1]


@pytest.mark.parametrize("line", ["", "[]", "{}", '{"version": 1, "value": 2}', "{"])
def test_a_line_that_is_no_result_is_named(tmp_path, line):
    path = tmp_path / "results.jsonl"
    path.write_text(make_result().to_json() + "\n" + line + "\n")
    with pytest.raises(FormatError, match=r"results\.jsonl, line 2: not a result"):
        read_results(path)


def test_another_kind_of_file_is_named():
    with pytest.raises(FormatError, match="not a result, but part of a file of kind finetuning"):
        Result.from_json('{"version": 1, "kind": "finetuning", "settings": {}}')


def test_a_newer_format_is_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"version": 2}) + "\n")
    with pytest.raises(FormatError, match="format 2; this release reads 1"):
        read_results(path)


def test_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_results(tmp_path / "results.jsonl", [make_result(value=float("nan"))])


def test_files_that_cannot_be_used_are_storage_errors(tmp_path):
    with pytest.raises(StorageError, match="cannot be read"):
        read_results(tmp_path / "absent.jsonl")
    with pytest.raises(StorageError, match="cannot be written"):
        append_results(tmp_path, [make_result()])


def test_sources_outside_a_checkout_may_be_named(monkeypatch):
    results._commit.cache_clear()
    monkeypatch.setenv("CATS_COMMIT", "abc123")
    try:
        assert results.environment("cpu")["commit"] == "abc123"
    finally:
        results._commit.cache_clear()


def test_joined_results_stand_once_run_by_run(tmp_path):
    first = [make_result(settings={"sparsity": s}, environment={"time": "1"}) for s in (0.5, 0.7)]
    second = [make_result(settings={"sparsity": 0.5}, environment={"time": "2"}, value=9.0)]
    append_results(tmp_path / "a", first[:1])
    append_results(tmp_path / "b", [*second, *first])
    found = join_results([tmp_path / "a", tmp_path / "b"])
    assert found == [*first, *second]
    assert [run_of(result) for result in found] == [run_of(first[0])] * 2 + [run_of(second[0])]
    append_results(tmp_path / "joined", found)
    assert join_results([tmp_path / "joined", tmp_path / "a"]) == found


def test_results_that_do_not_agree_are_not_joined(tmp_path):
    about = {"sparsity": 0.5, "limit_us": 2.0, "bytes": 8}
    one = make_result(settings=about, environment={"time": "1"})
    append_results(tmp_path / "a", [one])
    for name, other in {
        "b": dataclasses.replace(one, value=2.0),
        "c": dataclasses.replace(one, settings=about | {"bytes": 9}),
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
    append_results(tmp_path / "a.jsonl", [make_result(environment={"time": "1"})])
    append_results(tmp_path / "b.jsonl", [make_result(environment={"time": "2"})])
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "a.jsonl")]
    run = CliRunner().invoke(app, ["bench", "join", *files, "-o", str(tmp_path / "all.jsonl")])
    assert run.exit_code == 0, run.output
    assert "2 results of 2 runs" in run.output.replace("\n", " ")
    assert len(read_results(tmp_path / "all.jsonl")) == 2
