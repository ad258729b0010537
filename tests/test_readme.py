"""The Python of README.md runs, on a tiny model in the place of the named ones."""

import re
from pathlib import Path

import pytest

import cats
from cats import checkpoint, data, smollm2
from tests import models

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder: that of a tiny model and its tokenizer, which ``smollm2`` names."""
    models.make_model().save_pretrained(tmp_path)
    tokenizer = models.make_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(smollm2, "checkpoint", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def block_below(heading):
    """The first block of Python below a heading."""
    pattern = rf"^### {heading}$.*?```python\n(.*?)```"
    return re.search(pattern, README, re.DOTALL | re.MULTILINE)[1]


def test_calibrate_apply_and_save(folder, monkeypatch):
    text = data.sample_text()[:10_000]
    monkeypatch.setattr(data, "sample_text", lambda: text)
    block = block_below("In Python")
    name = "HuggingFaceTB/SmolLM2-135M"
    assert name in block
    names = {}
    exec(block.replace(name, str(folder)), names)
    assert cats.CatsConfig.load("cats50.safetensors").target_sparsity == 0.5
    assert checkpoint.is_sparse_checkpoint("./smollm2-cats50")
    sparse = {name for name, _ in names["model"].named_buffers() if name.endswith("threshold")}
    assert sparse == {f"{name}.act_fn.threshold" for name in names["config"].thresholds}


def test_generate_text(folder, capsys):
    model = checkpoint.load_dense(folder)
    config = cats.calibrate(model, [models.make_ids()], target_sparsity=0.5)
    config.save("cats50.safetensors")
    names = {}
    exec(block_below("Generate text in Python"), names)
    printed = capsys.readouterr().out
    longest = len("The largest of all cats is")
    assert names["ids"].shape == (2, longest + 32)
    assert [turn["role"] for turn in names["chat"]] == ["user", "assistant"] * 2
    for answer in (names["chat"][1], names["chat"][3]):
        assert answer["content"] in printed
