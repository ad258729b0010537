import subprocess
import sys

import pytest
import typer

from cats.cli import app


def test_module_runs_the_command():
    run = subprocess.run([sys.executable, "-m", "cats", "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert "python -m cats" in run.stdout


BAD = {
    "device": (("bench", "mlp", "--shape", "8x8", "--device", "toaster"), "no device 'toaster'"),
    "device of a shape": (("bench", "decode", "llama-3.2-1b", "--device", "toaster"), "no device"),
    "folder for results": (("bench", "mlp", "--shape", "8x8", "-o", "."), "is a folder"),
    "timeline": (("bench", "timeline", "mistral-7b", "--device", "cpu"), "a CUDA device, got"),
    "document": (("bench", "results", "quote", "absent.md"), "no such file"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_of_benchmarks_ends_in_one_line(command, arguments, message):
    code, _, err = command(*arguments)
    assert code == 1
    assert err.startswith("error: ")
    assert message in err


def commands(group, *names):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *names, name)
        elif name != "lm-eval" and not command.hidden:
            yield (*names, name)


@pytest.mark.parametrize("names", list(commands(typer.main.get_command(app))), ids=" ".join)
def test_help_names_every_option_whole_in_80_characters(command, monkeypatch, names):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = command(*names, "--help")
    assert code == 0, err
    cut = [line for line in out.splitlines() if line.lstrip("│* ").startswith("-") and "…" in line]
    assert not cut


@pytest.mark.parametrize("name", ["curves", "join", "plot", "quote", "show"])
def test_command_that_was_moved_says_where_it_is_now(command, name):
    code, _, err = command("bench", name, "file", "--some-option", "-o", "x")
    assert code == 2
    assert err == f"cats bench {name} is now: cats bench results {name}\n"
