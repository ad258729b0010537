import runpy
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="needs the extra dev")

EXAMPLE = Path(__file__).parents[2] / "examples" / "openai_client.py"


def test_the_example_asks_a_server(address, monkeypatch, capsys):
    arguments = [f"{address}/v1", "Who sat on the mat?", "--tokens", "6"]
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["model"] == "tiny"
    whole = lines["chat"].rpartition(" (")[0]
    assert lines["streamed"].startswith(f"{whole}, ")
    assert float(lines["log probability"]) < 0
