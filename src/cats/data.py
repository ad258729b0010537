"""From text to blocks of token ids without padding."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cats.errors import DataError, StorageError

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


def token_blocks(
    tokenizer: Any, texts: str | Iterable[str], *, length: int = 512, limit: int | None = None
) -> Tensor:
    """Pack texts into blocks of equal length, so that there is no padding.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: One text, or several that are joined with the tokenizer's end-of-text token.
        length: Tokens a block, ``T``.
        limit: At most so many blocks.

    Returns:
        Token ids ``[N, T]``, int64; a rest shorter than a block is left out.

    Raises:
        DataError: If the texts fill no block.
    """
    if length < 1:
        raise DataError(f"a block needs at least one token, got length {length}")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for i, text in enumerate([texts] if isinstance(texts, str) else texts):
        # verbose: no warning that a whole book is longer than the model's context
        piece = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += (end if i else []) + piece
        if limit is not None and len(ids) >= limit * length:
            break
    blocks = len(ids) // length if limit is None else min(len(ids) // length, limit)
    if not blocks:
        raise DataError(
            f"the text has {len(ids)} tokens, too few for one block of {length}: "
            "give more text or a smaller block length"
        )
    return torch.tensor(ids[: blocks * length]).view(blocks, length)


def as_batch(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Ids ``[B, T]`` and a boolean mask ``[B, T]``, or None where nothing is padded.

    Raises:
        DataError: If the batch is of another form.
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
