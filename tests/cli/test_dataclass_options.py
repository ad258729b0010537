import inspect
from dataclasses import dataclass, field

import pytest
import typer
from typer.testing import CliRunner

from cats.cli.dataclass_options import Chosen, help_of, option_name, options_of
from cats.cli.finetune_options import NAMES
from cats.finetuning import FinetuneOptions
from cats.recipes import TrainingData


@dataclass(kw_only=True)
class Options:
    """For a test.

    Attributes:
        steps: How many, over
            two lines: [0, 1].
        names: A name, such as a[b].
        fast: Whether.
        half: Either way.
    """

    steps: int = field(default=3, metadata={"least": 1})
    names: tuple[str, ...] = ()
    fast: bool = False
    half: bool | None = None


@dataclass(kw_only=True)
class More:
    """
    Attributes:
        size: Another one.
    """

    size: float = 0.5


@pytest.fixture
def invoke():
    app, passed = typer.Typer(rich_markup_mode="rich"), {}

    @app.command()
    @options_of("more", More, {None: ("size",)})
    @options_of(
        "options",
        Options,
        {"Own": ("steps", "names"), None: ("fast", "half")},
        names={"names": "--name,-n"},
        defaults={"steps": 5},
    )
    def command(model: str, *, options: Chosen, more: Chosen, last: bool = False) -> None:
        passed.update(model=model, options=options, more=more, last=last)

    def run(*arguments):
        result = CliRunner().invoke(app, arguments)
        return result, dict(passed)

    return run


def test_fields_are_options_with_the_dataclasss_types_and_defaults(invoke):
    result, passed = invoke("m", "--name", "a", "-n", "b", "--fast", "--no-half", "--size", "2")
    assert result.exit_code == 0, result.output
    assert passed["options"].values == {
        "steps": 5,
        "names": ("a", "b"),
        "fast": True,
        "half": False,
    }
    assert passed["options"].typed == {"names", "fast", "half"}
    assert passed["more"] == Chosen({"size": 2.0}, frozenset({"size"}))
    assert (passed["model"], passed["last"]) == ("m", False)
    _, passed = invoke("m", "--steps", "5", "--last")
    assert passed["options"].values == {"steps": 5, "names": (), "fast": False, "half": None}
    assert passed["options"].typed == {"steps"}
    assert passed["last"]


def test_least_value_is_that_of_the_field(invoke):
    result, _ = invoke("m", "--steps", "0")
    assert result.exit_code == 2
    assert "--no-fast" not in result.output
    assert invoke("m", "--no-fast")[0].exit_code == 2


def test_help_is_what_the_docstring_says(invoke):
    words = help_of(Options)
    assert words["steps"] == "How many, over two lines: [0, 1]."
    output = " ".join(invoke("--help")[0].output.replace("│", " ").split())
    assert "How many, over two lines: [0, 1]. [default: 5]" in output
    assert "A name, such as a[b]. Repeatable." in output


@pytest.mark.parametrize("cls", [FinetuneOptions, TrainingData])
def test_every_field_has_its_words(cls):
    assert list(help_of(cls)) == list(cls.__dataclass_fields__)


def test_an_option_is_called_by_its_first_name():
    names = [option_name(field, NAMES) for field in ("learning_rate", "bfloat16", "save_every")]
    assert names == ["--learning-rate", "--bf16", "--save-every"]


def test_every_field_of_a_fine_tuning_has_an_option():
    from cats.cli.finetune import finetune

    options = set(inspect.signature(finetune).parameters)
    assert set(FinetuneOptions.__dataclass_fields__) <= options
    assert set(TrainingData.__dataclass_fields__) <= options
    assert set(NAMES) <= options
