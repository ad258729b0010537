"""``cats export`` and ``cats bench peer`` without a peer: what a user types."""

import pytest
import torch

from cats.results import PeerMemory, PeerTokenTime, read_results
from tests import models

pytest.importorskip("gguf", reason="the format's own library")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose widths are whole blocks, and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    models.make_model(hidden_size=32, intermediate_size=64, head_dim=16).save_pretrained(folder)
    models.make_tokenizer(merges=[("x", "y")]).save_pretrained(folder)
    return folder


def test_a_written_file_is_read_and_timed(folder, command, command_json, one_thread, tmp_path):
    file, output = tmp_path / "tiny.gguf", tmp_path / "peer.jsonl"
    code, out, err = command("export", folder, "--type", "Q4_0", "--no-tokenizer", "-o", file)
    assert code == 0, err
    assert out.startswith("wrote")
    blocks = command_json("info", file)["quantised weights"]
    assert blocks["Q4_0"] == "14 matrices"
    assert blocks["Q8_0"] == "2 matrices"
    sizes = (
        "--prompt-length",
        3,
        "--new-tokens",
        4,
        "--prefill",
        0,
        "--rounds",
        2,
        "--read-mib",
        1,
    )
    options = ("--no-peer", "--dtype", "float32", "--calibration-tokens", 64, "-o", output)
    code, out, err = command("bench", "peer", file, *sizes, *options)
    assert code == 0, err
    assert "cats-50" in out
    results = read_results(output)
    assert [r.sparsity for r in results if isinstance(r, PeerTokenTime)] == [0.0, 0.5]
    assert [r.model for r in results if isinstance(r, PeerMemory)] == ["tiny"]
    code, shown, err = command("bench", "results", "show", output)
    assert code == 0, err
    assert "resident" in shown


def test_wrong_names_end_in_one_line(folder, command, tmp_path):
    code, _, err = command("export", folder, "-o", tmp_path / "model.bin")
    assert code == 1
    assert "ends in .gguf" in err
    code, _, err = command("export", folder, "--type", "q3", "-o", tmp_path / "model.gguf")
    assert code == 1
    assert "got 'q3'" in err
    code, _, err = command("bench", "peer", folder)
    assert code == 1
    assert "expected a GGUF file" in err
