"""Turn text into blocks of token ids without padding."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cats.errors import DataError, StorageError
from cats.protocols import Tokenizer

# Token ids [B, T], or a mapping with input_ids and optionally attention_mask, both [B, T].
Batch: TypeAlias = Tensor | Mapping[str, Any]

SAMPLE = "pride_and_prejudice.txt.gz"


def read_text(path: str | Path) -> str:
    """A UTF-8 text file, gzip-compressed where its name ends in ``.gz``.

    Raises:
        StorageError: If it cannot be read.
        DataError: If it is not UTF-8 text, or empty.
    """
    path = Path(path)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, {error}") from error
    except FileNotFoundError as error:
        raise StorageError(f"{path}: no such file") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"{path}: cannot be read: {reason}") from error
    if not text.strip():
        raise DataError(f"{path}: holds no text")
    return text


def sample_text() -> str:
    """The text that ships with the package: Pride and Prejudice, in the public domain."""
    with resources.as_file(resources.files("cats") / "texts" / SAMPLE) as path:
        return read_text(path)


def text_start(tokenizer: Tokenizer, bos: bool | None = None) -> list[int]:
    """Ids of the special tokens before a text: none, or a beginning-of-sequence token.

    Args:
        tokenizer: A Hugging Face tokenizer.
        bos: None: the tokens that the tokenizer puts before a text when it is called; its settings
            are not read. True: the same, but its ``bos_token`` if it puts none. False: none.

    Raises:
        DataError: If the tokenizer has no such token, or if its output does not show which tokens
            it puts before a text.
    """
    if bos is False:
        return []
    text, with_special = (
        list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True)
    )
    positions = range(len(with_special) + 1)
    starts = [i for i in positions if with_special[i : i + len(text)] == text]
    if not starts or (not text and with_special):
        raise DataError(
            f"the tokenizer makes {text} of the text 'a', and {with_special} with its special "
            "tokens: which of them begin a text cannot be told; say bos=False (--no-bos) to have "
            "none"
        )
    start = with_special[: starts[0]]
    if bos and not start:
        if tokenizer.bos_token_id is None:
            raise DataError(
                "the tokenizer has no beginning-of-sequence token: leave out bos=True (--bos)"
            )
        start = [tokenizer.bos_token_id]
    return start


def cut_blocks(
    pieces: Iterable[list[int]], *, length: int, start: list[int]
) -> Iterator[list[int]]:
    """Join the pieces and cut them into blocks of ``length`` ids that begin with ``start``.

    If the ids of a block begin with ``start`` already, it is not added again. Ids at the end that
    do not fill a block are dropped.

    Raises:
        DataError: If a block has no room for a token after ``start``.
    """
    if length <= len(start):
        after = f" after the {len(start)} that begin it" if start else ""
        raise DataError(f"a block needs at least one token{after}, got length {length}")
    ids: list[int] = []
    for piece in pieces:
        ids += piece
        position = 0
        while True:
            begin = [] if ids[position : position + len(start)] == start else start
            end = position + length - len(begin)
            if end > len(ids):
                break
            yield begin + ids[position:end]
            position = end
        del ids[:position]


def token_blocks(
    tokenizer: Tokenizer,
    texts: str | Iterable[str],
    *,
    length: int = 512,
    limit: int | None = None,
    bos: bool | None = None,
) -> Tensor:
    """Pack texts into blocks of equal length, so that there is no padding.

    If the tokenizer begins a text with a beginning-of-sequence token, so does every block, since
    models that were trained with this token are far worse without it.

    Example:
        >>> blocks = cats.data.token_blocks(tokenizer, text, length=512, limit=200)

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: One text, or several texts, which are joined with the tokenizer's end-of-text token.
        length: Tokens per block, ``T``, including those of :func:`text_start`.
        limit: Largest number of blocks.
        bos: How each block begins; see :func:`text_start`.

    Returns:
        Token ids ``[N, T]``, int64. Ids at the end that do not fill a block are dropped.

    Raises:
        DataError: If the texts fill no block, or the tokenizer does not allow this ``bos``.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = 0

    def pieces() -> Iterator[list[int]]:
        nonlocal tokens
        for i, text in enumerate([texts] if isinstance(texts, str) else texts):
            # verbose=False: no warning that a book is longer than the model's context
            piece = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            piece = (end if i else []) + piece
            tokens += len(piece)
            yield piece

    start = text_start(tokenizer, bos)
    blocks = list(islice(cut_blocks(pieces(), length=length, start=start), limit))
    if not blocks:
        raise DataError(
            f"the text has {tokens} tokens, too few for one block of {length}: "
            "give more text or a smaller block length"
        )
    return torch.tensor(blocks)


def as_batch(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Ids ``[B, T]``, and a boolean mask ``[B, T]`` or None if nothing is padded.

    Raises:
        DataError: If the batch has another form.
    """
    ids, mask = (batch, None) if isinstance(batch, Tensor) else (None, None)
    if isinstance(batch, Mapping):
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        shape = f" of shape {list(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else ""
        raise DataError(
            "expected a batch of integer token ids [B, T] or a mapping with input_ids and "
            f"attention_mask; got {type(batch).__name__}{shape}"
        )
    if mask is None:
        return ids, None
    if mask.shape != ids.shape:
        raise DataError(f"attention_mask {list(mask.shape)} does not fit input_ids {[*ids.shape]}")
    return ids, None if mask.bool().all() else mask.bool()
