"""The pieces of a text join to what the tokenizer makes of all tokens, whatever the tokens are."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from cats.decode.text import Detokenizer
from tests.models import make_tokenizer

WORDS = ["▁", "▁Hello", "▁the", "lo", "▁▁", ".", "'", "▁'", "n", "t", "a", "\ufffd", "😀", "</s>x"]


def with_added(tokenizer, **options):
    """Added to it: a special token, one more that is special by its mark only, and a plain one."""
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("<mark>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", **options)


def byte_level():
    backend = make_tokenizer().backend_tokenizer
    return with_added(backend)


def llama():
    """As that of Llama 2: ``▁`` is a space, unknown text is bytes, a first space is dropped."""
    names = [f"<0x{i:02X}>" for i in range(256)] + WORDS
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    to_bytes = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*to_bytes, decoders.Strip(" ", 1, 0)])
    return with_added(tokenizer)


def unigram():
    """As that of T5: the tokenizers' own decoder of ``▁``."""
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in WORDS], unk_id=0))
    tokenizer.decoder = decoders.Metaspace()
    return with_added(tokenizer)


def wordpiece(clean_up=True):
    """As that of BERT: parts of words, and rules about spaces."""
    parts = "do n t ##t ##n ' . , ! m s re ve n't 's a ##'"
    words = ["[UNK]", " ", *parts.split()]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return with_added(tokenizer, clean_up_tokenization_spaces=clean_up)


def end_of_word():
    """As that of GPT 1: words end in a mark that is a space where another one follows."""
    words = ["lo", "low</w>", "er</w>", "a", ".</w>"]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    tokenizer.decoder = decoders.BPEDecoder()
    return with_added(tokenizer)


TOKENIZERS = {
    make.__name__: make() for make in (byte_level, llama, unigram, wordpiece, end_of_word)
} | {"wordpiece as it is": wordpiece(clean_up=False)}


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def tokens_of(tokenizer):
    """Any tokens, ids that the tokenizer does not know, and the bytes of texts among them."""
    one = st.integers(0, len(tokenizer) + 1).map(lambda token: [token])
    chosen = [one]
    if tokenizer.convert_tokens_to_ids("<0x41>") is not None:
        chosen.append(st.text(max_size=4).map(lambda text: list(text.encode())))
    if tokenizer is TOKENIZERS["byte_level"]:
        chosen.append(st.text(max_size=4).map(lambda text: tokenizer(text)["input_ids"]))
    return st.lists(st.one_of(chosen), max_size=60).map(joined)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_pieces_join_to_the_text_of_all_tokens(name, data):
    tokenizer = TOKENIZERS[name]
    tokens, skip = data.draw(tokens_of(tokenizer)), data.draw(st.booleans())
    text = Detokenizer(tokenizer, skip_special_tokens=skip)
    pieces = ""
    for count, token in enumerate(tokens, 1):
        pieces += text.add([token])
        so_far = tokenizer.decode(tokens[:count], skip_special_tokens=skip)
        assert pieces + text.pending == so_far
    assert pieces + text.end() == tokenizer.decode(tokens, skip_special_tokens=skip)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_tokens_that_come_together_give_the_same_text(name, data):
    tokenizer = TOKENIZERS[name]
    groups = data.draw(st.lists(tokens_of(tokenizer), max_size=4))
    text = Detokenizer(tokenizer)
    pieces = "".join(map(text.add, groups)) + text.end()
    assert pieces == tokenizer.decode(joined(groups))


@given(text=st.text(alphabet="aé😀 👩‍🚀▁", min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
def test_no_character_comes_in_parts(text):
    detokenizer = Detokenizer(TOKENIZERS["byte_level"])
    pieces = [detokenizer.add([byte]) for byte in TOKENIZERS["byte_level"](text)["input_ids"]]
    assert [piece for piece in pieces if piece] == list(text)


def test_text_behind_a_prompt_keeps_its_first_space():
    tokenizer = TOKENIZERS["llama"]
    prompt, new = tokenizer.convert_tokens_to_ids(["▁the", "a"]), "▁Hello"
    ids = [tokenizer.convert_tokens_to_ids(new)]
    behind = Detokenizer(tokenizer, prompt=prompt)
    assert behind.add(ids) + behind.end() == " Hello"
    alone = Detokenizer(tokenizer)
    assert alone.add(ids) + alone.end() == "Hello" == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["byte_level", "llama"])
@pytest.mark.parametrize("before", [0, 1, 3])
def test_character_that_begins_in_the_prompt_is_new_text(name, before):
    tokenizer = TOKENIZERS[name]
    ids = list("😀😀".encode()) if name == "llama" else tokenizer("😀😀")["input_ids"]
    text = Detokenizer(tokenizer, prompt=ids[: 4 + before])
    assert text.add(ids[4 + before :]) + text.end() == "😀"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_work_for_a_token_does_not_grow(name, monkeypatch):
    tokenizer = TOKENIZERS[name]
    ids = [i % (len(tokenizer) + 2) for i in range(0, 3_000 * 7, 7)]
    if name == "llama":
        ids += list("😀".encode()) * 500  # held back until its end
    decoded, decode = [], tokenizer.decode
    monkeypatch.setattr(
        tokenizer, "decode", lambda ids, **o: decoded.append(len(ids)) or decode(ids, **o)
    )
    text = Detokenizer(tokenizer, skip_special_tokens=True)
    pieces = "".join(text.add([token]) for token in ids) + text.end()
    assert sum(decoded) < 50 * len(ids)
    assert pieces == decode(ids, skip_special_tokens=True)
