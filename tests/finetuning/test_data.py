import pytest
import torch

from cats.errors import DataError
from cats.finetuning import Blocks, PairFormat, Pairs, StreamedBlocks
from cats.finetuning.data import IGNORED, collate, describe, longest, pack

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def text_of(tokenizer, ids):
    return tokenizer.decode(ids)


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
    assert [text_of(tokenizer, row["input_ids"]) for row in stream] == [
        "abcd", "ef<eos>g", "hij<eos>", "klmn", "opq<eos>",
    ]  # fmt: skip
    # a second pass starts anew
    assert len([*stream]) == 5


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
