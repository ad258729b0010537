import json
import sys

import pytest
import torch

from cats.cli import main
from tests import models


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    models.make_model().save_pretrained(folder)
    models.make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("It is a truth universally acknowledged. " * 60)
    return str(path)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run ``cats ...``; returns exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["cats", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        return caught.value.code or 0, printed.out, printed.err

    return run


@pytest.fixture
def command_json(command):
    """Run ``cats ... --json`` and parse its output."""

    def run(*arguments):
        code, out, err = command(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return run
