"""Text of a recipe: blocks to calibrate on, blocks held out to measure on, the paper's data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from cats.data import token_blocks
from cats.errors import ConfigError, DataError
from cats.recipes.tokens import check_tokens

REFINED_WEB = "tiiuae/falcon-refinedweb"


def split(
    tokenizer: Any,
    texts: str | Iterable[str],
    *,
    block: int = 512,
    tokens: int = 100_000,
    held_out_tokens: int = 10_000,
    held_out_text: str | None = None,
    seed: int = 0,
    bos: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Blocks ``[N, T]`` for calibration and held-out ones, drawn from the text by the seed.

    Args:
        tokenizer: Of the model.
        texts: What is cut into blocks.
        block: Tokens of a block.
        tokens: For calibration, at most, in whole blocks.
        held_out_tokens: Held out, at most, in whole blocks, and no more than a fifth of the text.
        held_out_text: Where the held-out blocks come from instead.
        seed: Of the draw.
        bos: As for :func:`cats.data.token_blocks`.

    Raises:
        ConfigError: If the tokens are fewer than one block has.
        DataError: If the text is too short.
    """
    check_tokens(tokens, block, "tokens")
    check_tokens(held_out_tokens, block, "held_out_tokens")
    blocks = shuffled(token_blocks(tokenizer, texts, length=block, bos=bos), seed)
    wanted = held_out_tokens // block
    if held_out_text is not None:
        held_out = token_blocks(tokenizer, held_out_text, length=block, bos=bos)[:wanted]
    else:
        wanted = min(wanted, max(1, len(blocks) // 5))
        blocks, held_out = blocks[wanted:], blocks[:wanted]
    if not len(blocks):
        raise DataError(
            f"the text fills one block of {block} tokens, and one is held out: give more text, "
            "a smaller block, or another text to hold out (--eval-text)"
        )
    return blocks[: tokens // block], held_out


def shuffled(blocks: Tensor, seed: int) -> Tensor:
    """The rows in an order that the seed draws."""
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))]


def refined_web(documents: int, seed: int) -> Iterator[str]:
    """So many documents of RefinedWeb, drawn by the seed and streamed from the hub."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            "RefinedWeb needs the data library: pip install 'cats-llm[eval]', or give --text"
        ) from error
    stream = load_dataset(REFINED_WEB, split="train", streaming=True)
    for row in itertools.islice(stream.shuffle(seed=seed), documents):
        yield row["content"]
