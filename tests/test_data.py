import gzip
from importlib import resources

import pytest
import torch
from tokenizers import processors

from cats.data import SAMPLE, as_batch, read_text, sample_text, text_start, token_blocks
from cats.errors import DataError, StorageError
from tests import models


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz"])
def test_text_is_read_plain_and_compressed(tmp_path, name):
    data = "Füße\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read_text(tmp_path / name) == "Füße\n"


def _gz(damage):
    return damage(gzip.compress(b"some text " * 1000, mtime=0))


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        ("x.txt", b"\xff\xfe\x00", DataError),
        ("x.txt", b"", DataError),
        ("x.txt", b" \n\t", DataError),
        ("x.gz", b"not gzip", StorageError),
        ("x.gz", _gz(lambda d: d[: len(d) // 2]), StorageError),
        ("x.gz", _gz(lambda d: d[:12] + b"\xff" * 20 + d[32:]), StorageError),
    ],
    ids=["binary", "empty", "blank", "not gzip", "truncated gzip", "damaged gzip"],
)
def test_unusable_text_is_refused_with_its_path(tmp_path, name, data, error):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match="x\\."):
        read_text(tmp_path / name)


def test_missing_text_is_refused(tmp_path):
    with pytest.raises(StorageError, match="absent"):
        read_text(tmp_path / "absent.txt")
    with pytest.raises(StorageError):
        read_text(tmp_path)


def test_sample_text_ships_with_its_origin():
    assert len(sample_text()) > 200_000
    assert "truth universally acknowledged" in sample_text()
    folder = resources.files("cats") / "texts"
    readme = " ".join((folder / "README.md").read_text().split())
    assert SAMPLE in readme
    assert "public domain" in readme


def test_texts_are_packed_without_padding_and_joined_with_the_end():
    blocks = token_blocks(models.make_tokenizer(), ["abc", "de", "f"], length=4)
    tokenizer = models.make_tokenizer()
    letters = [tokenizer(letter)["input_ids"][0] for letter in "abcdef"]
    a, b, c, d, e, f = letters
    assert blocks.dtype == torch.int64
    assert blocks.tolist() == [[a, b, c, 256], [d, e, 256, f]]


def test_every_block_begins_as_the_tokenizer_begins_a_text():
    tokenizer = models.make_tokenizer(begins=True)
    bos, a, b, c, d, e, f = tokenizer("abcdef")["input_ids"]
    assert bos == models.BOS
    blocks = token_blocks(tokenizer, ["abc", "de", "f"], length=4)
    assert blocks.tolist() == [[bos, a, b, c], [bos, 256, d, e]]
    assert token_blocks(tokenizer, "abcdef", length=3, limit=2).tolist() == [
        [bos, a, b],
        [bos, c, d],
    ]
    assert token_blocks(tokenizer, "abcdef", length=3, bos=False).tolist() == [[a, b, c], [d, e, f]]


def test_text_that_begins_itself_is_not_begun_twice():
    tokenizer = models.make_tokenizer(begins=True)
    bos, a, b, c = tokenizer("abc")["input_ids"]
    assert token_blocks(tokenizer, "<bos>abc", length=3).tolist() == [[bos, a, b]]
    assert token_blocks(tokenizer, "<bos>abcc", length=3).tolist() == [[bos, a, b], [bos, c, c]]


def test_start_is_what_a_tokenizer_does_not_what_it_names():
    plain, begins = models.make_tokenizer(), models.make_tokenizer(begins=True)
    assert text_start(plain) == []
    assert text_start(begins) == text_start(begins, bos=True) == [models.BOS]
    assert text_start(begins, bos=False) == []
    plain.bos_token = "<eos>"
    assert text_start(plain) == []
    assert text_start(plain, bos=True) == [256]
    # what ends a text does not begin it
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> <bos> $A <eos>", special_tokens=[("<bos>", models.BOS), ("<eos>", 256)]
    )
    assert text_start(begins) == [models.BOS] * 2


def test_start_that_cannot_be_is_refused():
    with pytest.raises(DataError, match="no beginning-of-sequence token"):
        token_blocks(models.make_tokenizer(), "abc", length=2, bos=True)
    with pytest.raises(DataError, match="one token after the 1 that begin it, got length 1"):
        token_blocks(models.make_tokenizer(begins=True), "abc", length=1)

    def without_text(text, add_special_tokens=True):
        return {"input_ids": [7] if add_special_tokens else []}

    with pytest.raises(DataError, match="cannot be told; say bos=False"):
        text_start(without_text)


def test_limit_and_rest_are_left_out():
    tokenizer = models.make_tokenizer()
    assert token_blocks(tokenizer, "x" * 25, length=4).shape == (6, 4)
    assert token_blocks(tokenizer, "x" * 25, length=4, limit=2).shape == (2, 4)


@pytest.mark.parametrize(("text", "length"), [("abc", 4), ("", 4), ([], 4), ("abc", 0)])
def test_too_little_text_is_refused(text, length):
    with pytest.raises(DataError):
        token_blocks(models.make_tokenizer(), text, length=length)


def test_batch_without_padding_has_no_mask():
    ids = models.make_ids()
    for batch in (ids, {"input_ids": ids}, {"input_ids": ids, "attention_mask": ids * 0 + 1}):
        got, mask = as_batch(batch)
        assert got is ids
        assert mask is None


@pytest.mark.parametrize(
    "batch",
    [
        torch.rand(2, 3),
        torch.ones(3, dtype=torch.int64),
        {"ids": torch.ones(2, 3, dtype=torch.int64)},
        {"input_ids": [[1, 2]]},
        "text",
        {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 4)},
    ],
)
def test_batch_of_another_form_is_refused(batch):
    with pytest.raises(DataError):
        as_batch(batch)
