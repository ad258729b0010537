import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from cats.errors import FormatError
from cats.history import is_history
from cats.results import (
    DemoTime,
    MaskTime,
    MLPTime,
    Perplexity,
    Result,
    TaskScore,
    TokenCost,
    read_results,
)
from tests.records import (
    demo_time,
    first_token_time,
    launch_time,
    mlp_time,
    moment,
    peak_memory,
    perplexity,
    start_up_time,
    task_score,
    token_time,
)

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results"


def test_committed_results_are_read_and_written_again_byte_for_byte():
    files = [path for path in sorted(COMMITTED.rglob("*.jsonl")) if not is_history(path)]
    assert files
    # a demo writes no committed file, and costs are those of each user's device
    kinds = {DemoTime, MaskTime, TokenCost}
    for path in files:
        results = read_results(path)
        assert "".join(result.to_json() + "\n" for result in results) == path.read_text()
        kinds |= {type(result) for result in results}
    assert set(Result.kinds.values()) == kinds


def test_every_record_is_read_back_as_its_type():
    decode = (token_time, first_token_time, start_up_time, peak_memory, launch_time)
    results = [make(1.5) for make in (mlp_time, *decode, moment, demo_time)]
    for result in [*results, perplexity("cats-50", 20.0), task_score("dense", 0.5)]:
        assert Result.from_json(result.to_json()) == result
        assert type(Result.from_json(result.to_json())) is type(result)


CHANGES = {
    "missing": (lambda line: line["settings"].pop("limit_us"), "settings.limit_us: missing"),
    "unknown": (lambda line: line["settings"].update(colour="red"), "settings.colour: unknown"),
    "unknown outside": (lambda line: line.update(colour="red"), ": colour: unknown"),
    "a field of all": (lambda line: line["settings"].update(value=2), "settings.value: unknown"),
    "unit": (lambda line: line.update(unit="ms"), "unit: expected 'us', got 'ms'"),
    "type": (
        lambda line: line["settings"].update(batch="1"),
        "settings.batch: input should be a valid integer, got '1'",
    ),
    "whole number": (lambda line: line["settings"].update(batch=1.5), "settings.batch: input"),
    "a truth is no number": (lambda line: line.update(samples=True), "samples: input should be"),
    "infinite": (lambda line: line.update(value=float("inf")), "value: "),
    "device": (lambda line: line["environment"].pop("device"), "environment: .*names no device"),
    "no settings": (lambda line: line.pop("settings"), "settings: missing"),
    "no kind": (lambda line: line.update(quantity="colour"), "no benchmark 'mlp' gives a quantity"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_line_that_breaks_its_schema_is_named_with_file_line_and_field(tmp_path, change, message):
    path = tmp_path / "results.jsonl"
    line = json.loads(mlp_time(1.5).to_json())
    change(line)
    path.write_text(mlp_time(1.5).to_json() + "\n" + json.dumps(line) + "\n")
    with pytest.raises(FormatError, match=rf"results\.jsonl, line 2: not a result.*{message}"):
        read_results(path)


def test_each_fault_of_a_line_is_named():
    line = json.loads(mlp_time(1.5).to_json())
    del line["settings"]["dtype"], line["settings"]["batch"]
    with pytest.raises(FormatError, match=r"settings\.dtype: missing; settings\.batch: missing"):
        Result.from_json(json.dumps(line))


def test_record_is_checked_when_it_is_made():
    with pytest.raises(ValidationError, match="finite number"):
        mlp_time(float("nan"))
    with pytest.raises(ValidationError, match="unit"):
        mlp_time(1.5, unit="ms")
    with pytest.raises(FormatError, match=r"settings\.model: missing"):
        TaskScore.of({"method": "dense"}, quantity="acc", value=0.5)


def test_what_was_found_does_not_say_what_was_measured():
    result = mlp_time(1.5, sparsity=0.5)
    assert isinstance(result, MLPTime)
    found_along = result.settings.keys() - result.measured.keys()
    assert found_along == {"kept_share", "limit_us", "copies", "calls"}


def test_fields_that_older_releases_did_not_write_are_not_written_either():
    result = perplexity("dense", 20.0)
    assert isinstance(result, Perplexity)
    assert result.thresholds is None
    assert "thresholds" not in result.to_json()


def test_methods_stand_in_their_order_and_others_after_them():
    names = ["teal-30", "cats-50", "product-50", "relu", "cats-30", "dense"]
    results = sorted((perplexity(name, 1.0) for name in names), key=lambda r: r.order)
    ordered = [result.variant for result in results]
    assert ordered == ["dense", "cats-30", "cats-50", "relu", "teal-30", "product-50"]


@pytest.mark.parametrize("line", ["", "[]", "{}", '{"version": 1, "value": 2}', "{"])
def test_a_line_that_is_no_result_is_named(tmp_path, line):
    path = tmp_path / "results.jsonl"
    path.write_text(mlp_time(1.5).to_json() + "\n" + line + "\n")
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


def test_reading_and_showing_results_needs_no_torch():
    names = "results, report, report.quotes, report.timeline, report.model, cli.bench_results"
    code = "; ".join(f"import cats.{name}" for name in names.split(", "))
    code += "; import sys; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
