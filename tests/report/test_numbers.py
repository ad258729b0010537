import pytest
from typer.testing import CliRunner

from cats.cli import app
from cats.errors import DataError
from cats.history import History, Point
from cats.report.numbers import Facts, number
from cats.report.quotes import requote
from cats.results import append_results
from tests.records import perplexity, token_time


@pytest.fixture
def folder(tmp_path):
    run = tmp_path / "run"
    perplexities = [perplexity("dense", 24.9), perplexity("cats-50", 32.37)]
    append_results(run / "perplexity.jsonl", perplexities)
    append_results(run / "tokens.jsonl", [token_time(4.0, batch=batch) for batch in (1, 2)])
    points = [
        Point(step=i, tokens=10 * i, losses={"c4": loss}, accuracy={"sums": 0.25})
        for i, loss in enumerate((3.0, 2.5))
    ]
    settings = {"method": "dense"}
    History(settings=settings, points=points, complete=True).save(run / "tuning" / "dense.jsonl")
    return run


NUMBERS = {
    "a value": ('value(variant="dense", text="wiki.txt.gz")', ".1f", "24.9"),
    "a ratio": ('value(variant="cats-50") / value(variant="dense") - 1', ".0%", "30%"),
    "arithmetic": ("-(2 + 3) * 2 - 1 / 4", ".2f", "-10.25"),
    "a function": ("abs(min(1 - 3, 5))", ".0f", "2"),
    "a rate": ("tokens_per_second(batch=2, sparsity=0.0)", ",.0f", "500"),
    "a speed-up": ("speedup(batch=1)", ".2f", "1.00"),
    "a loss": ('loss(run="dense", point="last") - loss(point="first")', "+.2f", "-0.50"),
    "an accuracy": ('accuracy(task="sums", step=1)', ".0%", "25%"),
}


@pytest.mark.parametrize(("expression", "form", "expected"), NUMBERS.values(), ids=NUMBERS)
def test_number_is_what_the_files_say(folder, expression, form, expected):
    assert number(Facts(folder), expression, form) == expected


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ('value(variant="cats-70")', "nothing in .* is value"),
        ('colour(variant="dense")', "nothing in .* is colour"),
        ("value(quantity='time')", "2 measurements .* say also one of batch"),
    ],
)
def test_measurement_that_is_not_there_once_is_named(folder, expression, message):
    with pytest.raises(DataError, match=message):
        number(Facts(folder), expression, ".1f")


NO_NUMBERS = ("'a' + 1", "__import__('os').getcwd()", "value", "9 ** 9")


@pytest.mark.parametrize("expression", NO_NUMBERS)
def test_expression_that_is_no_number_is_refused(folder, expression):
    with pytest.raises(DataError, match="is no number"):
        number(Facts(folder), expression, ".1f")


def test_syntax_format_and_division_are_checked(folder):
    for expression, form, message in (
        ("value(", ".1f", "value"),
        ("1 / 3", "what", "'what'"),
        ("1 / 0", ".1f", "division"),
    ):
        with pytest.raises(DataError, match=message):
            number(Facts(folder), expression, form)


def test_measurement_that_was_made_again_counts_once(tmp_path):
    times = [
        token_time(value, environment={"device": "a GPU", "time": str(value)})
        for value in (4.0, 2.0)
    ]
    append_results(tmp_path / "tokens.jsonl", times)
    assert number(Facts(tmp_path / "tokens.jsonl"), "value()", ".1f") == "2.0"
    append_results(tmp_path / "tokens.jsonl", [token_time(3.0, environment={"device": "other"})])
    with pytest.raises(DataError, match="say also one of device"):
        number(Facts(tmp_path), "value()", ".1f")
    assert number(Facts(tmp_path), 'value(device="other")', ".1f") == "3.0"


@pytest.fixture
def document(folder):
    path = folder.parent / "README.md"
    path.write_text(
        'It rises\nfrom <!-- = run: value(variant="dense"): .1f -->1<!-- / --> to '
        '<!-- = run/perplexity.jsonl: value(variant="cats-50"): .1f --><!-- / -->, it does.\n'
    )
    return path


def test_numbers_in_sentences_are_checked_and_mended(document):
    quote = ["bench", "results", "quote", str(document)]
    run = CliRunner().invoke(app, [*quote, "--check"])
    assert isinstance(run.exception, DataError)
    assert "line 2" in str(run.exception)
    assert CliRunner().invoke(app, quote).exit_code == 0
    text = document.read_text()
    assert "-->24.9<!-- / --> to <!--" in text
    assert "-->32.4<!-- / -->, it does." in text
    assert CliRunner().invoke(app, [*quote, "--check"]).exit_code == 0


def test_number_that_cannot_be_found_is_named_with_its_line(document):
    document.write_text("one\n\nthe <!-- = run: value(variant='no'): .1f -->1<!-- / -->\n")
    with pytest.raises(DataError, match=r"README\.md, line 3: nothing in"):
        requote(document)


@pytest.mark.parametrize(
    "broken",
    [
        "the <!-- = run: value(variant='dense'): .1f -->1<!-- -->",
        "the <!-- = run: value(variant='dense') -->1<!-- / -->",
        "<!-- quality: run -->\n| 1 |\n",
    ],
)
def test_mark_that_is_not_complete_is_an_error_and_not_passed_over(document, broken):
    document.write_text(document.read_text() + broken + "\n")
    with pytest.raises(DataError, match="3 marks begin a table or a number and 2 are complete"):
        requote(document)


def test_number_that_would_end_its_paragraph_is_refused(document):
    document.write_text(document.read_text().replace("from <!--", "from\n<!--"))
    with pytest.raises(DataError, match="line 3: a number begins its line"):
        requote(document)
