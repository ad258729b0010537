import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from cats.decode.stop import StopStrings
from tests.models import make_tokenizer


@pytest.fixture(scope="module")
def sentencepiece():
    words = [f"<0x{i:02X}>" for i in range(256)] + ["▁A", "▁cat", "s", "▁is", ".", "▁"]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def end_of(stop, tokenizer, prompt, new):
    """How many new tokens there are once the string is found; None where it is not."""
    stops = StopStrings((stop,), tokenizer, [prompt])
    for count, token in enumerate(new, 1):
        if stops.add(torch.tensor([token])):
            return count
    return None


@pytest.mark.parametrize(
    ("stop", "new", "end"),
    [
        (" cat", "▁cat s", 1),
        ("cat", "▁cat s", 1),
        (" cats", "▁cat s .", 2),
        (" cat is", "▁cat ▁is", 2),
        (" A", "▁cat", None),  # the prompt's
        ("😀", "▁cat <0xF0> <0x9F> <0x98> <0x80> s", 5),
        ("s", "▁cat <0xF0> <0x9F> <0x98> <0x80> s", 6),
        ("t 😀 c", "▁cat ▁ <0xF0> <0x9F> <0x98> <0x80> ▁cat", 7),
    ],
)
def test_strings_are_found_in_the_text_after_the_prompt(sentencepiece, stop, new, end):
    ids = sentencepiece.convert_tokens_to_ids
    assert end_of(stop, sentencepiece, ids(["▁A"]), ids(new.split())) == end


def test_long_strings_are_found_across_many_tokens():
    tokenizer = make_tokenizer()
    new = tokenizer("x" * 50 + "a long string, and 😀 that" * 2)["input_ids"]
    stop = "a long string, and 😀 that"
    assert end_of(stop, tokenizer, [1], new) == 50 + len(stop.encode())


def test_rows_end_by_themselves():
    tokenizer = make_tokenizer()
    stops = StopStrings(("ab", "c"), tokenizer, [[1], [2], []])
    columns = zip(*(tokenizer(text)["input_ids"] for text in ("abx", "xxc", "baa")), strict=True)
    ended = [stops.add(torch.tensor(column)).tolist() for column in columns]
    assert ended == [[False] * 3, [True, False, False], [True, True, False]]
