"""The Python of docs/recipes.md runs, on a tiny model instead of the named one."""

import re
from pathlib import Path

import cats
from cats import data, recipes

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_the_example_runs(model, tokenizer, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = data.sample_text()[:60_000]
    monkeypatch.setattr(data, "sample_text", lambda: text)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    name = "HuggingFaceTB/SmolLM2-135M"
    assert name in block
    exec(block.replace(name, str(tmp_path)), {})
    config = cats.CatsConfig.load("cats.safetensors")
    printed = capsys.readouterr().out
    assert "calibrating: 1 of " in printed
    assert f"\n{config.target_sparsity} " in printed


def test_every_recipe_is_in_the_table():
    named = set(re.findall(r"`(\w+)", PAGE[PAGE.index("| --- |") :]))
    classes = {"Progress", "split"}
    assert set(recipes.__all__) - classes <= named | {"LargestSparsity"}
