import pytest
from typer.testing import CliRunner

from cats.cli import app
from cats.errors import DataError
from cats.history import History, Point
from cats.report.quotes import requote
from cats.results import append_results
from tests.records import mlp_time, perplexity, task_score, token_time


def result(variant, sparsity, value, **changes):
    return mlp_time(value, variant=variant, sparsity=sparsity, **changes)


@pytest.fixture
def document(tmp_path):
    times = [result("dense_eager", 0.0, 100.0), result("cuda", 0.0, 80.0)]
    times += [result("cuda", 0.5, 50.0), result("cuda", 0.5, 70.0, neighbour="rmsnorm")]
    append_results(tmp_path / "mlp.jsonl", times)
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- mlp: mlp.jsonl -->\nold\n<!-- /mlp -->\nafter\n")
    return path


def test_quoted_table_is_made_from_the_file(document):
    text = requote(document)
    assert text.startswith("before\n<!-- mlp: mlp.jsonl -->\na GPU, bfloat16: micro")
    assert text.endswith("|\n<!-- /mlp -->\nafter\n")
    assert "|  | cuda | 80.0 (0.50, 1.00x) | 50.0 (0.80, 1.60x) |" in text
    assert "70.0" not in text


def test_quoting_again_changes_nothing(document):
    text = requote(document)
    document.write_text(text)
    assert requote(document) == text


def test_check_shows_the_line_that_differs(document):
    def quote(*options):
        return CliRunner().invoke(app, ["bench", "results", "quote", str(document), *options])

    run = quote("--check")
    assert isinstance(run.exception, DataError)
    assert "line 3" in str(run.exception)
    assert "\n- old\n+ a GPU, bfloat16" in str(run.exception)
    assert "\nold\n" in document.read_text()
    assert quote().exit_code == 0
    assert quote("--check").exit_code == 0


def quoted_tokens(folder, rows):
    append_results(folder / "decode.jsonl", rows)
    document = folder / "README.md"
    document.write_text("<!-- decode: decode.jsonl -->\n<!-- /decode -->\n")
    return document, requote(document)


def test_times_of_tokens_are_quoted_too(tmp_path):
    rows = [
        token_time(value, dtype="bfloat16", variant="stream", sparsity=sparsity)
        for sparsity, value in ((0.0, 4.0), (0.5, 2.5))
    ]
    document, text = quoted_tokens(tmp_path, rows)
    assert "| a model | stream | 250.0 (0.50, 1.00x) | 400.0 (0.80, 1.60x) |" in text
    document.write_text(text)
    assert requote(document) == text


def test_speedup_is_over_the_dense_loop_of_the_same_run(tmp_path):
    rows = [
        token_time(4.0, dtype="bfloat16", variant="compiled", sparsity=0.5, dense_ms=5.0),
        token_time(2.0, dtype="bfloat16", variant="stream", sparsity=0.5, dense_ms=3.0),
        token_time(2.0, dtype="bfloat16", variant="stream", sparsity=0.7, dense_ms=4.0),
    ]
    _, text = quoted_tokens(tmp_path, rows)
    assert "| compiled | 250.0 (0.50, 1.25x) |" in text
    assert "| stream | 500.0 (1.00, 1.50x) | 500.0 (1.00, 2.00x) |" in text


def test_speedup_is_left_out_where_the_run_timed_no_dense_loop(tmp_path):
    rows = [
        token_time(4.0, dtype="bfloat16", variant="compiled", sparsity=0.5, dense_ms=5.0),
        token_time(2.0, dtype="bfloat16", variant="generate", sparsity=0.5, dense_ms=None),
    ]
    _, text = quoted_tokens(tmp_path, rows)
    assert "| generate | 500.0 (1.00) |" in text


def in_run(time, *results):
    return [
        r.model_copy(update={"environment": {"device": "a GPU", "time": time}}) for r in results
    ]


def quoted_mlps(folder, rows):
    append_results(folder / "mlp.jsonl", rows)
    (folder / "README.md").write_text("<!-- mlp: mlp.jsonl -->\n<!-- /mlp -->\n")
    return requote(folder / "README.md")


def test_mlps_of_two_runs_are_not_compared(tmp_path):
    first = in_run("1:00", result("dense_eager", 0.0, 100.0), result("cuda", 0.5, 50.0))
    second = in_run("2:00", result("triton", 0.5, 20.0))
    text = quoted_mlps(tmp_path, [*first, *second])
    assert "|  | cuda |  | 50.0 (0.80, 2.00x) |" in text
    assert "| 64x128, run of 2:00 | no dense in this run |  |  |" in text
    assert "|  | triton |  | 20.0 (2.00) |" in text


def test_run_whose_points_were_all_measured_again_is_left_out(tmp_path):
    first = in_run("1:00", result("dense_eager", 0.0, 100.0), result("cuda", 0.5, 50.0))
    second = in_run("2:00", result("dense_eager", 0.0, 90.0), result("cuda", 0.5, 45.0))
    text = quoted_mlps(tmp_path, [*first, *second])
    assert text.count("64x128") == 1
    assert "| 64x128 | best dense of: dense_eager 90.0 | 90.0 |  |" in text
    assert "|  | cuda |  | 45.0 (0.89, 2.00x) |" in text


def test_batches_and_prompts_of_one_table_are_told_apart(tmp_path):
    rows = [
        token_time(4.0, dtype="bfloat16", variant="stream", sparsity=0.0, **changes)
        for changes in ({}, {"batch": 2}, {"prompt_length": 8192})
    ]
    _, text = quoted_tokens(tmp_path, rows)
    assert "a GPU, bfloat16, batch 1, prompt 8: tokens" in text
    assert "| a model | stream | 250.0 " in text
    assert "| a model, batch 2 | stream | 500.0 " in text
    assert "| a model, prompt 8,192 | stream | 250.0 " in text


def test_dtypes_of_one_table_are_told_apart(tmp_path):
    rows = [
        token_time(4.0, environment={"device": "a CPU"}, dtype=dtype, variant="eager", sparsity=0.0)
        for dtype in ("float32", "bfloat16")
    ]
    _, text = quoted_tokens(tmp_path, rows)
    assert "| a model, float32 | eager | 250.0 (0.50, 1.00x) |" in text
    assert "| a model, bfloat16 | eager | 250.0 (0.50, 1.00x) |" in text


def test_document_without_a_quote_is_an_error(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("nothing\n")
    with pytest.raises(DataError, match="KIND: PATH"):
        requote(path)


def test_histories_of_a_folder_are_quoted(tmp_path):
    for name, method, losses in (
        ("dense-lr1", "dense", (3.0, 2.5)),
        ("cats-50", "cats", (4.0, 3.0)),
    ):
        points = [
            Point(step=step, tokens=100 * step, losses={"c4": loss}, sparsity=0.5)
            for step, loss in zip((0, 9), losses, strict=True)
        ]
        settings = {"method": method, "model": "a model", "dtype": "bfloat16"}
        history = History(settings=settings, environment={"device": "a GPU"}, points=points)
        history.complete = True
        history.save(tmp_path / "runs" / f"{name}.jsonl")
    History(settings=settings, points=points).save(tmp_path / "runs" / "stopped.jsonl")
    document = tmp_path / "README.md"
    document.write_text("<!-- finetune: runs -->\n<!-- /finetune -->\n")
    text = requote(document)
    # of 1.5 more than the best dense run, 1.0 came back
    assert "| cats-50 | 9 | 900 | 4.0000 > 3.0000 (67%) | 50.0% |" in text
    assert "| dense-lr1 | 9 | 900 | 3.0000 > 2.5000 | 50.0% |" in text
    assert "stopped" not in text


def test_folder_without_a_complete_history_is_named(tmp_path):
    document = tmp_path / "README.md"
    document.write_text("<!-- finetune: runs -->\n<!-- /finetune -->\n")
    with pytest.raises(DataError, match="complete history"):
        requote(document)


def test_quality_of_every_variant_is_quoted(tmp_path):
    shares = {"cats-50": 0.67, "dense": 1.0, "cats-30": 0.8}
    texts = [perplexity(variant, 20 / share, mlp_share=share) for variant, share in shares.items()]
    tasks = [
        task_score(variant, 0.5 + 0.1 * share, task=task, difference=0.1 * share - 0.1)
        for variant, share in shares.items()
        for task in ("piqa", "mean")
    ]
    append_results(tmp_path / "run" / "perplexity" / "all.jsonl", texts)
    append_results(tmp_path / "run" / "tasks.jsonl", tasks)
    document = tmp_path / "README.md"
    document.write_text("<!-- quality: run -->\n<!-- /quality -->\n")
    lines = requote(document).splitlines()
    assert [line for line in lines if line.startswith("| dense")] == [
        "| dense | 100.0% | 20.00 | 60.00% |  |"
    ]
    assert "| cats-50 | 67.0% | 29.85 | 56.70% | -3.30 ± 1.20 |" in lines
    assert "| task (split, questions) | dense | cats-30 | cats-50 |" in lines
    row = "| piqa (test, 1,000) | 60.0% | 58.0% (-2.00 ± 1.20) | 56.7% (-3.30 ± 1.20) |"
    assert row in lines


@pytest.mark.parametrize("bos", [None, True])
def test_quoted_quality_says_whether_blocks_begin_with_a_token(tmp_path, bos):
    result = perplexity("dense", 20.0, bos=bos)
    append_results(tmp_path / "run" / "perplexity" / "all.jsonl", [result])
    document = tmp_path / "README.md"
    document.write_text("<!-- quality: run -->\n<!-- /quality -->\n")
    assert ("begun with a beginning-of-sequence token" in requote(document)) is bool(bos)


def test_folder_without_the_dense_model_is_named(tmp_path):
    document = tmp_path / "README.md"
    document.write_text("<!-- quality: run -->\n<!-- /quality -->\n")
    with pytest.raises(DataError, match="dense model"):
        requote(document)
