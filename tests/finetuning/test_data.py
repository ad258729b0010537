import random

import pytest
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers import decoders as token_decoders
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from cats.errors import DataError
from cats.finetuning import Blocks, PairFormat, Pairs, StreamedBlocks
from cats.finetuning.data import IGNORED, collate, describe, longest, pack
from tests import models

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def text_of(tokenizer, ids):
    return tokenizer.decode(ids)


def make_spaced_tokenizer(cls=PreTrainedTokenizerFast):
    """Puts a space before each text that it is given, as Llama 2 and Mistral 0.1 do."""
    words = ["<unk>", "<s>", "</s>", "▁", *"athw?\n:", "▁a", "at"]
    model = token_models.BPE(
        {word: i for i, word in enumerate(words)}, [("▁", "a"), ("a", "t")], unk_token="<unk>"
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = token_decoders.Sequence(
        [token_decoders.Replace("▁", " "), token_decoders.Fuse(), token_decoders.Strip(" ", 1, 0)]
    )
    return cls(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


class Slow(PreTrainedTokenizerFast):
    """A tokenizer that does not say which part of the text a token comes from."""

    is_fast = False

    def __call__(self, *args, **kwargs):
        assert "return_offsets_mapping" not in kwargs
        return super().__call__(*args, **kwargs)


def test_only_the_answer_and_its_end_are_learnt(tokenizer):
    row = Pairs.of_texts(tokenizer, [("2+2?", "four")])[0]
    learnt = row["labels"] != IGNORED
    assert text_of(tokenizer, row["input_ids"]) == "2+2?\nfour<eos>"
    assert text_of(tokenizer, row["input_ids"][learnt]) == "four<eos>"
    assert torch.equal(row["labels"][learnt], row["input_ids"][learnt])


def test_chat_template_is_used_where_there_is_one(tokenizer):
    tokenizer.chat_template = TEMPLATE
    row = Pairs.of_texts(tokenizer, [("2+2?", "four")])[0]
    assert text_of(tokenizer, row["input_ids"]) == "<user>2+2?</><assistant>four</>"
    assert text_of(tokenizer, row["input_ids"][row["labels"] != IGNORED]) == "four</>"


def test_template_that_rewrites_the_prompt_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}{{ messages[0]['content'] }}"
    with pytest.raises(DataError, match="chat template changes the prompt"):
        Pairs.of_texts(tokenizer, [("2+2?", "four")])


@pytest.mark.parametrize("cls", [PreTrainedTokenizerFast, Slow])
def test_pairs_have_the_tokens_of_their_text(cls):
    tokenizer = make_spaced_tokenizer(cls)
    pairs = Pairs.of_texts(tokenizer, [("what?", "a")])
    assert pairs.prompts[0] + pairs.answers[0] == tokenizer("what?\na</s>")["input_ids"]
    assert pairs.prompts[0] == tokenizer("what?\n")["input_ids"]


def letters(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def make_spanning_tokenizer():
    """The end of a line and the letter a are one token."""
    tokenizer = models.make_tokenizer(merges=[("Ċ", "a")])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    return tokenizer


def test_prompt_keeps_its_tokens_where_one_token_would_span_prompt_and_answer():
    tokenizer = make_spanning_tokenizer()
    assert letters(tokenizer, tokenizer("b\na")["input_ids"]) == "b Ċa"
    pairs = Pairs.of_texts(tokenizer, [("b", "ac"), ("b", "cd")])
    assert pairs.prompts == [tokenizer("b\n")["input_ids"]] * 2
    assert [letters(tokenizer, ids) for ids in pairs.answers] == ["a c <eos>", "c d <eos>"]


def test_answer_behind_a_space_of_the_prompt_gets_no_second_one():
    tokenizer = make_spaced_tokenizer()
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}: "
        "{% if messages[1] is defined %}{{ messages[1]['content'] }}</s>{% endif %}"
    )
    assert letters(tokenizer, tokenizer("w: a")["input_ids"]) == "▁ w : ▁a"
    pairs = Pairs.of_texts(tokenizer, [("w", "at")])
    assert letters(tokenizer, pairs.prompts[0]) == "▁ w : ▁"
    assert letters(tokenizer, pairs.answers[0]) == "at </s>"


def test_prompt_keeps_its_tokens_where_the_answer_changes_them():
    tokenizer = models.make_tokenizer(merges=[("Ċ", "Ċ")])
    # white space before a letter is cut otherwise than at the end of a text
    assert letters(tokenizer, tokenizer("b\n\na")["input_ids"]) == "b Ċ Ċ a"
    pairs = Pairs.of_texts(tokenizer, [("b\n", "a")])
    assert letters(tokenizer, pairs.prompts[0]) == "b ĊĊ"
    assert letters(tokenizer, pairs.answers[0]) == "a <eos>"


@pytest.mark.parametrize("make", [make_spaced_tokenizer, make_spanning_tokenizer])
def test_prompts_are_as_served_and_the_text_is_whole_wherever_the_answer_begins(make):
    tokenizer, draw = make(), random.Random(0)

    def text():
        return "".join(draw.choices("at: \n", k=draw.randint(1, 4)))

    texts = [(text(), text()) for _ in range(300)]
    texts = [(prompt, answer) for prompt, answer in texts if prompt.strip() and answer.strip()]
    pairs = Pairs.of_texts(tokenizer, texts)
    for i, (prompt, answer) in enumerate(texts):
        assert pairs.prompts[i] == tokenizer(f"{prompt}\n")["input_ids"]
        joined = tokenizer(f"{prompt}\n{answer}")["input_ids"]
        ids = pairs[i]["input_ids"].tolist()
        assert tokenizer.decode(ids) == tokenizer.decode([*joined, tokenizer.eos_token_id])


def test_tokens_that_cannot_be_told_apart_without_offsets_are_refused():
    fast = make_spanning_tokenizer()
    slow = Slow(tokenizer_object=fast.backend_tokenizer, eos_token="<eos>")
    with pytest.raises(DataError, match=r"pair 2: the answer changes .* use a fast tokenizer"):
        Pairs.of_texts(slow, [("b", "c"), ("b", "a")])


def test_answer_without_tokens_is_refused(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("b", "")
    with pytest.raises(DataError, match="pair 1: its answer has no tokens"):
        Pairs.of_texts(tokenizer, [("a", "b")])


def test_prompts_begin_as_the_tokenizer_begins_a_text():
    tokenizer = models.make_tokenizer(begins=True)
    pairs = Pairs.of_texts(tokenizer, [("a", "b"), ("<bos>a", "b")])
    assert pairs.prompts == [tokenizer("a\n")["input_ids"]] * 2
    assert pairs.answers == [tokenizer("b<eos>")["input_ids"][1:]] * 2
    assert pairs.start == [models.BOS]
    assert Pairs.of_texts(tokenizer, [("a", "b")], bos=False).prompts[0] == pairs.prompts[0][1:]
    assert describe(pairs)["hash"] != describe(
        Pairs.of_texts(tokenizer, [("a", "b")] * 2, bos=False)
    )


@pytest.mark.parametrize("begin", ["", "{{ bos_token }}"])
def test_prompts_begin_as_the_chat_template_says(begin):
    tokenizer = models.make_tokenizer(begins=True)
    tokenizer.chat_template = begin + TEMPLATE
    user = [{"role": "user", "content": "a"}]
    served = tokenizer.apply_chat_template(user, add_generation_prompt=True, return_dict=False)
    bos = [models.BOS]
    for choice, expected_start in ((None, bos if begin else []), (True, bos), (False, [])):
        pairs = Pairs.of_texts(tokenizer, [("a", "b")], bos=choice)
        assert pairs.prompts[0] == expected_start + served[len(bos) if begin else 0 :]
        assert pairs.start == expected_start
    assert Pairs.of_texts(tokenizer, [("a", "b")]).prompts[0] == served


BAD_PAIRS = {
    "none": ([], "no pairs"),
    "empty answer": ([("a", "b"), ("a", " ")], "pair 2"),
    "too long": (
        [("a", "b"), ("a" * 30, "b")],
        "1 of 2 pairs are longer than 16 .* pair 2 with 33",
    ),
}


@pytest.mark.parametrize(("pairs", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_bad_pairs_are_refused(tokenizer, pairs, message):
    with pytest.raises(DataError, match=message):
        Pairs.of_texts(tokenizer, pairs, length=16)


def test_format_fills_columns_and_names_labels():
    boolq = PairFormat(prompt="{passage}\n{question}?", answer="{label}", labels=("no", "yes"))
    assert boolq.columns == ["passage", "question", "label"]
    row = {"passage": "p", "question": "q", "label": True}
    assert boolq.apply(row) == ("p\nq?", "yes")
    with pytest.raises(DataError, match="label is 2, but there are 2 labels"):
        boolq.apply(row | {"label": 2})


def test_label_within_a_sentence_is_named():
    form = PairFormat(answer="It is {label}.", labels=("no", "yes"))
    assert form.apply({"question": "q", "label": 1}) == ("q", "It is yes.")


@pytest.mark.parametrize(
    ("prompt", "message"), [("{question", "expected '}'"), ("{}", "name the column")]
)
def test_broken_format_is_refused(prompt, message):
    with pytest.raises(DataError, match=message):
        PairFormat(prompt=prompt).columns  # noqa: B018


BAD_ROWS = {
    "label that is text": ({"answer": "{label}", "labels": ("no", "yes")}, "label is 'maybe'"),
    "two labelled columns": ({"answer": "{label}{x}", "labels": ("no",)}, "of one column"),
    "number of text": ({"prompt": "{label:d}"}, "does not fit a row"),
    "absent column": ({"prompt": "{absent}"}, "does not fit a row"),
}


@pytest.mark.parametrize(("form", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_row_that_does_not_fit_its_format_is_refused(form, message):
    with pytest.raises(DataError, match=message):
        PairFormat(**form).apply({"question": "q", "answer": "a", "label": "maybe", "x": 0})


def test_blocks_of_another_dtype_are_refused():
    with pytest.raises(DataError, match=r"int64; got \[2, 3\] in float32"):
        Blocks(torch.zeros(2, 3))


def test_padding_is_hidden_and_not_learnt():
    short, long = torch.tensor([5, 6]), torch.tensor([7, 8, 9])
    batch = collate([{"input_ids": x, "labels": x} for x in (short, long)])
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[5, 6, IGNORED], [7, 8, 9]]


def test_full_rows_need_no_mask():
    rows = Blocks(torch.arange(6).view(2, 3))
    assert collate([rows[0], rows[1]]).keys() == {"input_ids", "labels"}


def test_stream_gives_the_blocks_of_the_texts(tokenizer):
    texts = ["abcdef", "ghij", "klmnopq"]
    stream = StreamedBlocks(tokenizer, lambda: iter(texts), length=4)
    blocks = [text_of(tokenizer, row["input_ids"]) for row in stream]
    assert blocks == ["abcd", "ef<eos>g", "hij<eos>", "klmn", "opq<eos>"]
    # a second pass starts from the beginning
    assert len([*stream]) == 5


def test_stream_begins_each_block_as_blocks_do():
    tokenizer = models.make_tokenizer(begins=True)

    def stream(**kwargs):
        return StreamedBlocks(tokenizer, lambda: iter(["abcdef", "ghij"]), length=4, **kwargs)

    def texts(**kwargs):
        return [text_of(tokenizer, row["input_ids"]) for row in stream(**kwargs)]

    assert texts() == ["<bos>abc", "<bos>def", "<bos><eos>gh", "<bos>ij<eos>"]
    assert texts(bos=False) == ["abcd", "ef<eos>g", "hij<eos>"]
    blocks = Blocks.of_texts(tokenizer, ["abcdef", "ghij"], length=4)
    assert blocks.ids.tolist() == [row["input_ids"].tolist() for row in stream()][:3]
    assert describe(stream()) != describe(stream(bos=False))


def test_description_tells_other_data(tokenizer):
    one, two = (Pairs.of_texts(tokenizer, [("a", answer)]) for answer in ("b", "c"))
    assert describe(one)["tokens"] == describe(two)["tokens"] == 4
    assert describe(one)["hash"] != describe(two)["hash"]
    assert longest(one) == 4


def test_packed_pairs_hold_prompts_and_answers(tokenizer):
    pairs = Pairs.of_texts(tokenizer, [("ab", "c"), ("d", "e")])
    assert text_of(tokenizer, pack(pairs, length=8)[0]) == "ab\nc<eos>d\ne"
    with pytest.raises(DataError, match="9 tokens fill no block of 10"):
        pack(pairs, length=10)


def test_packed_pairs_begin_each_block_once():
    tokenizer = models.make_tokenizer(begins=True)
    pairs = Pairs.of_texts(tokenizer, [("ab", "cd"), ("e", "f")])
    blocks = [text_of(tokenizer, ids) for ids in pack(pairs, length=4)]
    assert blocks == ["<bos>ab\n", "<bos>cd<eos>", "<bos>e\nf"]
