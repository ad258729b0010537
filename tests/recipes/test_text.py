import pytest
import torch

from cats.data import token_blocks
from cats.errors import ConfigError, DataError
from cats.recipes import split

SMALL = {"block": 8, "tokens": 40, "held_out_tokens": 16}
TEXT = "".join(chr(97 + i * i % 23) for i in range(400))


def rows(blocks):
    return {tuple(row.tolist()) for row in blocks}


def test_no_block_is_in_both_halves_and_the_seed_decides(tokenizer):
    every = token_blocks(tokenizer, TEXT, length=8)
    blocks, held_out = split(tokenizer, TEXT, **SMALL)
    assert (len(blocks), len(held_out)) == (5, 2)
    chosen = torch.cat((blocks, held_out))
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    assert (torch.cat((held_out, blocks)) == every[order][:7]).all()
    assert rows(chosen) <= rows(every)
    again = split(tokenizer, TEXT, **SMALL, seed=1)
    assert not (again[0] == blocks).all()


def test_other_text_may_be_held_out(tokenizer):
    other = "z" * 40
    _, held_out = split(tokenizer, TEXT, **SMALL, held_out_text=other)
    assert (held_out == token_blocks(tokenizer, other, length=8)[:2]).all()


def test_too_little_is_refused(tokenizer):
    with pytest.raises(DataError, match="fills one block of 8"):
        split(tokenizer, "a" * 8, **SMALL)
    for name in ("tokens", "held_out_tokens"):
        with pytest.raises(ConfigError, match=f"^{name} 7 is less than one block of 8"):
            split(tokenizer, TEXT, **SMALL | {name: 7})
