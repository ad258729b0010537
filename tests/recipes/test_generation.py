import pytest

import cats
from cats.errors import DataError
from cats.recipes import answer
from cats.recipes.generation import tokens_per_second


def test_answer_is_that_of_generate_and_its_pieces_join(model, tokenizer):
    pieces, ticks = [], []
    callbacks = {"on_text": pieces.append, "on_token": lambda: ticks.append(1)}
    result = answer(model, tokenizer, "abc", max_new_tokens=9, **callbacks)
    ids = tokenizer("abc", return_tensors="pt")["input_ids"]
    output = cats.generate(model, ids, max_new_tokens=9, tokenizer=tokenizer)
    assert result.text == tokenizer.decode(output[0, 3:], skip_special_tokens=True)
    assert "".join(pieces) == result.text
    assert result.new_tokens == len(ticks) == output.shape[1] - 3
    assert result.tokens_per_second > 0


@pytest.mark.parametrize("seed", range(4))
def test_pieces_join_where_the_end_is_half_a_character(model, tokenizer, seed):
    pieces = []
    sampling = {"do_sample": True, "temperature": 2.0, "seed": seed}
    result = answer(model, tokenizer, "abc", max_new_tokens=9, on_text=pieces.append, **sampling)
    assert "".join(pieces) == result.text


def test_a_prompt_without_tokens_is_refused(model, tokenizer):
    with pytest.raises(DataError, match="no tokens"):
        answer(model, tokenizer, "")


def test_the_first_token_is_not_timed():
    assert tokens_per_second([10.0, 10.5, 11.0]) == 2
    assert tokens_per_second([3.0]) == 0
