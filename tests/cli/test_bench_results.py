from pathlib import Path

from cats.cli.bench_results import run_names


def test_runs_of_two_folders_keep_their_names_apart():
    files = [Path(f"{folder}/{name}.jsonl") for folder in "ab" for name in ("dense", folder)]
    assert [*run_names(files)] == ["a/dense", "a", "b/dense", "b"]
    assert [*run_names([Path("one/history.jsonl")] * 2)] == ["one"]
