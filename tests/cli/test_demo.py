import re

import pytest

from cats.report import Material

SMALL = ("--max-new-tokens", 4, "--tokens", 1024, "--eval-tokens", 1024)


def test_demo_compares_dense_and_sparse(command_json, checkpoint, text):
    report = command_json("demo", "--model", checkpoint, "--text", text, *SMALL)
    sides = report["sides"]
    assert sides["cats-50"]["token_bytes"] < sides["dense"]["token_bytes"]
    assert sides["dense"]["tokens_per_second"] > 0
    assert sides["cats-70"]["target_sparsity"] == 0.7


def test_demo_ends_in_a_page_of_what_it_measured(command, checkpoint, text, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "demo"
    code, out, err = command("demo", "--model", checkpoint, "--text", text, *SMALL, "-o", folder)
    assert code == 0, err
    assert "report.html" in "".join(out.split())  # long paths are wrapped
    material = Material.read([folder])
    (perplexities,) = material.perplexities().values()
    assert [r.settings["variant"] for r in perplexities] == [
        "dense",
        "cats-50",
        "cats-70",
        "cascade-b66.7",
        "cascade-b53.3",
    ]
    (times,) = material.times().values()
    assert len(times) == 6
    assert len(material.profiles) == 2
    page = (folder / "report.html").read_text("utf-8")
    assert "<svg" in page
    assert f"{perplexities[1].value:.3f}" in page
    # one sentence and one figure; the speeds are in that figure, and in a table
    (tradeoff,) = material.tradeoffs()
    assert tradeoff.sentence() in page
    assert " ".join(tradeoff.sentence().split()) in " ".join(out.split())
    assert "Perplexity against measured speed" in page
    assert "Time against sparsity" not in page
    assert "<th>quartiles</th></tr>" in page


def test_demo_says_at_the_start_how_long_it_takes(command, checkpoint, text):
    code, _, err = command("demo", "--model", checkpoint, "--text", text, *SMALL)
    assert code == 0, err
    assert re.match(r"about \d+ (s|min) at the speed of a first short batch\n", err)
