import subprocess
import sys

import pytest
import typer

from cats.cli import app


def test_module_runs_the_command():
    run = subprocess.run([sys.executable, "-m", "cats", "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert "python -m cats" in run.stdout


def commands(group, *names):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *names, name)
        elif name != "lm-eval":
            yield (*names, name)


@pytest.mark.parametrize("names", list(commands(typer.main.get_command(app))), ids=" ".join)
def test_help_names_every_option_whole_in_80_characters(command, monkeypatch, names):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = command(*names, "--help")
    assert code == 0, err
    cut = [line for line in out.splitlines() if line.lstrip("│* ").startswith("-") and "…" in line]
    assert not cut
