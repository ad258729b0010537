import io

import pytest
from rich.console import Console

from cats.cli import options
from cats.cli.running import resumable, stage


@pytest.mark.parametrize("terminal", [True, False])
def test_stage_is_shown_on_a_terminal_alone_and_wiped_at_its_end(monkeypatch, terminal):
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=40)
    monkeypatch.setattr(options, "err", console)
    with stage() as show:
        show("dense, eager: round 1 of 2")
    assert ("dense, eager: round 1 of 2 ..." in written.getvalue()) == terminal
    if not terminal:
        assert not written.getvalue().strip()


def test_long_stage_is_cut_to_one_line(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(options, "err", Console(file=written, force_terminal=True, width=20))
    with stage() as show:
        show("a name that is far too long for it")
    assert "a name that is far …" in written.getvalue()


@pytest.mark.parametrize("there", [True, False])
def test_stopped_command_says_where_it_goes_on_if_it_does(tmp_path, capsys, there):
    path = tmp_path / "a[b]"
    if there:
        path.touch()
    with pytest.raises(KeyboardInterrupt), resumable(path):
        raise KeyboardInterrupt
    said = capsys.readouterr().err
    assert said == (f"stopped; the same command goes on from {path}\n" if there else "")
