"""The Python of README.md and docs/python.md runs, on a tiny model instead of the named ones, and
the README's speeds are those of docs/performance.md, which are checked against results files.
"""

import re
from pathlib import Path

import pytest

import cats
from cats import checkpoint, data, smollm2
from cats.model import is_sparse
from cats.weights import is_quantised
from tests import models

ROOT = Path(__file__).parents[1]
NAME = "HuggingFaceTB/SmolLM2-135M"
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


@pytest.fixture
def short_text(monkeypatch):
    """A sample text of 10,000 characters."""
    text = data.sample_text()[:10_000]
    monkeypatch.setattr(data, "sample_text", lambda: text)


def read(document):
    return (ROOT / document).read_text(encoding="utf-8")


def block_below(document, heading):
    """The first block of Python below a heading of a document."""
    pattern = rf"^## {heading}$.*?```python\n(.*?)```"
    return re.search(pattern, read(document), re.DOTALL | re.MULTILINE)[1]


def test_the_ten_lines_of_the_readme_run(folder, short_text, capsys):
    block = block_below("README.md", "In Python")
    assert NAME in block
    names = {}
    exec(block.replace(NAME, str(folder)), names)
    assert names["ids"].shape == (1, len("A cat is") + 32)
    assert "A cat is" in capsys.readouterr().out
    assert checkpoint.is_sparse_checkpoint("./cats50")


def test_calibrate_apply_and_save(folder, short_text):
    block = block_below("docs/python.md", "Calibrate, measure and save")
    assert NAME in block
    names = {}
    exec(block.replace(NAME, str(folder)), names)
    assert cats.CatsConfig.load("cats50.safetensors").target_sparsity == 0.5
    assert checkpoint.is_sparse_checkpoint("./smollm2-cats50")
    sparse = {name for name, _ in names["model"].named_buffers() if name.endswith("threshold")}
    assert sparse == {f"{name}.act_fn.threshold" for name in names["config"].thresholds}


def test_other_libraries_apply_the_thresholds(folder):
    model = checkpoint.load_dense(folder)
    config = cats.calibrate(model, [models.make_ids()], target_sparsity=0.5)
    cats.sparsify_(model, config).save_pretrained("smollm2-cats50")
    checkpoint.load_tokenizer(folder).save_pretrained("smollm2-cats50")
    names = {}
    try:
        exec(block_below("docs/python.md", "In other libraries"), names)
    finally:
        cats.unregister()
    assert is_sparse(names["model"])
    assert is_sparse(names["generate"].model)


def test_quantise_from_python(folder, short_text):
    block = block_below("docs/quantised.md", "Quantise a model")
    assert NAME in block
    names = {}
    exec(block.replace(NAME, str(folder)).replace("bits=4", "bits=8"), names)
    assert is_quantised(checkpoint.load_dense("./smollm2-int4"))
    assert [step.name for step in names["made"].steps] == ["before", "layers"]


def test_generate_text(folder, capsys):
    model = checkpoint.load_dense(folder)
    config = cats.calibrate(model, [models.make_ids()], target_sparsity=0.5)
    config.save("cats50.safetensors")
    names = {}
    exec(block_below("docs/python.md", "Generate text"), names)
    printed = capsys.readouterr().out
    longest = len("The largest of all cats is")
    assert names["ids"].shape == (2, longest + 32)
    assert [turn["role"] for turn in names["chat"]] == ["user", "assistant"] * 2
    for answer in (names["chat"][1], names["chat"][3]):
        assert answer["content"] in printed


def test_many_sessions(folder, capsys):
    names = {
        "model": checkpoint.load_dense(folder),
        "tokenizer": checkpoint.load_tokenizer(folder),
    }
    exec(block_below("docs/python.md", "Many sessions at once"), names)
    assert names["cat"].result().text in capsys.readouterr().out
    assert names["lion"].reason in ("length", "stop")


def test_numbers_of_the_readme_are_those_of_the_quoted_tables():
    readme = " ".join(read("README.md").split())
    h200, cpu = (
        read("docs/performance.md").split(f"results/{name}/decode.jsonl")[1]
        for name in ("nvidia-h200", "amd-epyc-2-cores")
    )
    quality = read("docs/reproduce.md")

    def cell(text, *row):
        line = next(line for line in text.splitlines() if line.startswith(f"| {' | '.join(row)} |"))
        return line.split("|")[len(row) + 1 : -1]

    def rate(cells, column):
        return cells[column].split()[0]

    def gain(cells, column):
        return cells[column].split(", ")[1].rstrip(") ").removesuffix("x")

    def drop(task_mean):
        return f"{-float(task_mean.split()[0].rstrip('%')):.1f}"

    mistral, generate = cell(h200, "mistral-7b", "stream"), cell(h200, "mistral-7b", "generate")
    long = cell(h200, "mistral-7b, prompt 32,000", "stream")
    small = cell(h200, "smollm2-135m", "stream")
    float32, bfloat16 = (cell(cpu, f"smollm2, {name}", "eager") for name in ("float32", "bfloat16"))
    codes = read("docs/performance.md").split("results/nvidia-h200/decode-quantised.jsonl")[1]
    name = "mistral-7b, int4 in groups of 128"
    int4, torch_int4 = (cell(codes, name, engine) for engine in ("stream", "compiled_torch_int4"))
    dense, half, most = (cell(quality, name) for name in ("dense", "cats-50", "cats-70"))
    assert rate(generate, 0) == rate(generate, 1)
    for said in (
        f"**{gain(mistral, 1)} times as fast at 50 %.**",
        f"{rate(mistral, 0)} tokens per second dense, {rate(mistral, 1)} with half",
        f"gives {rate(generate, 0)} tokens per second dense and at 50 %",
        f"falls from {gain(mistral, 1)} to {gain(long, 1)} times",
        f"{gain(small, 1)} times as fast at 50 % on an H200, and {gain(float32, 1)} (float32) "
        f"to {gain(bfloat16, 1)} times (bfloat16)",
        f"gains {gain(cell(h200, 'llama-3.2-1b, batch 2', 'compiled'), 1)} times with two rows",
        f"rises from {float(dense[2]):.1f} to {float(half[2]):.1f} at 50 %, to "
        f"{float(most[2]):.1f} at 70 %",
        f"falls by {drop(half[4])} points",
        f"gives {rate(int4, 0)} tokens per second in int4 and {rate(int4, 1)} with half",
        f"torch's own int4 operator gives {rate(torch_int4, 0)}",
    ):
        assert said in readme
