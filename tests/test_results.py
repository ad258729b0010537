import dataclasses
import json

import pytest

from cats import results
from cats.errors import FormatError, StorageError
from cats.results import Result, append_results, environment, read_results


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
