"""Text of a recipe: blocks for calibration, held-out blocks, and the paper's data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from cats.data import token_blocks
from cats.errors import ConfigError, DataError
from cats.protocols import Tokenizer
from cats.recipes.tokens import check_tokens

REFINED_WEB = "tiiuae/falcon-refinedweb"


def split(
    tokenizer: Tokenizer,
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
        tokenizer: Tokenizer of the model.
        texts: Texts to cut into blocks.
        block: Tokens per block.
        tokens: Largest number of calibration tokens, in whole blocks.
        held_out_tokens: Largest number of held-out tokens, in whole blocks; never more than a
            fifth of the text.
        held_out_text: Another text for the held-out blocks.
        seed: Seed of the draw.
        bos: As for :func:`cats.data.token_blocks`.

    Raises:
        ConfigError: If a number of tokens is less than one block.
        DataError: If the text is too short.
    """
    check_tokens(tokens, block, "tokens")
    check_tokens(held_out_tokens, block, "held_out_tokens")
    blocks = shuffled(token_blocks(tokenizer, texts, length=block, bos=bos), seed)
    count = held_out_tokens // block
    if held_out_text is not None:
        held_out = token_blocks(tokenizer, held_out_text, length=block, bos=bos)[:count]
    else:
        count = min(count, max(1, len(blocks) // 5))
        blocks, held_out = blocks[count:], blocks[:count]
    if not len(blocks):
        raise DataError(
            f"the text fills one block of {block} tokens, and one is held out: give more text, "
            "a smaller block, or another text to hold out (--eval-text)"
        )
    return blocks[: tokens // block], held_out


def shuffled(blocks: Tensor, seed: int) -> Tensor:
    """The rows in a random order; the seed decides which."""
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))]


def refined_web(documents: int, seed: int) -> Iterator[str]:
    """This number of documents of RefinedWeb, drawn by the seed and streamed from the hub.

    Raises:
        ConfigError: If the package ``datasets`` is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            "RefinedWeb needs the data library: pip install 'cats-llm[eval]', or give --text"
        ) from error
    stream = load_dataset(REFINED_WEB, split="train", streaming=True)
    for row in itertools.islice(stream.shuffle(seed=seed), documents):
        yield row["content"]
