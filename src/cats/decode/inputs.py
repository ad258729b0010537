"""Prompts in every form that users have them, as one batch padded on the left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cats.errors import DataError

Prompts = Tensor | Mapping[str, Any] | Sequence[int] | Sequence[Sequence[int]] | str | Sequence[str]


def batch_of(
    inputs: Prompts,
    attention_mask: Tensor | None,
    *,
    pad_token_id: int,
    vocabulary: int,
    tokenizer: Any = None,
) -> tuple[Tensor, Tensor]:
    """Token ids and mask of prompts, ``[B, T]`` each, int64 and bool, on the inputs' device.

    Args:
        inputs: Ids ``[B, T]``, what a tokenizer returns, one list of ids, or several of any
            lengths, which are then padded; texts where there is a tokenizer.
        attention_mask: ``[B, T]``, 0 where a row is padded on its left; None where it is not.
        pad_token_id: Fills up rows of different lengths.
        vocabulary: Ids must be below.
        tokenizer: Makes ids of texts.

    Raises:
        DataError: If there are no tokens, or they or the mask cannot be right.
    """
    rows: Any = _ids_of_texts(inputs, tokenizer)
    if isinstance(inputs, Mapping):
        if "input_ids" not in inputs:
            raise DataError(f"expected input_ids among {', '.join(map(str, inputs)) or 'nothing'}")
        rows = inputs["input_ids"]
        attention_mask = inputs.get("attention_mask") if attention_mask is None else attention_mask
    if not isinstance(rows, Tensor):
        if attention_mask is not None:
            raise DataError("give lists of ids without a mask: they are padded here")
        rows, attention_mask = _padded(rows, pad_token_id)
    ids: Tensor = rows[None] if rows.ndim == 1 else rows
    if ids.ndim != 2 or ids.numel() == 0:
        raise DataError(f"expected token ids [B, T] with at least one, got {list(ids.shape)}")
    if ids.is_floating_point() or ids.min() < 0 or ids.max() >= vocabulary:
        raise DataError(f"expected token ids from 0 to {vocabulary - 1}, the model's vocabulary")
    if attention_mask is None:
        return ids.long(), torch.ones_like(ids, dtype=torch.bool)
    mask = attention_mask.bool().reshape(attention_mask.shape[-2:] if ids.shape[0] > 1 else (1, -1))
    if mask.shape != ids.shape:
        raise DataError(f"expected a mask {list(ids.shape)}, got {list(attention_mask.shape)}")
    if not mask[:, -1].all() or (mask[:, :-1] & ~mask[:, 1:]).any():
        raise DataError(
            "expected padding on the left only: set tokenizer.padding_side = 'left', or give "
            "lists of ids"
        )
    return ids.long(), mask.to(ids.device)


def _ids_of_texts(inputs: Any, tokenizer: Any) -> Any:
    """Lists of ids in the place of texts; anything else as it is."""
    texts = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(texts, list | tuple) or not any(isinstance(t, str) for t in texts):
        return inputs
    if tokenizer is None:
        raise DataError(
            f"expected token ids, a tensor [B, T] or lists, got text {str(texts[0])[:40]!r}: pass "
            "tokenizer=... as well, or what tokenizer(text, return_tensors='pt') gives"
        )
    if not all(isinstance(t, str) for t in texts):
        raise DataError("expected texts or lists of token ids, got some of both")
    return tokenizer(list(texts))["input_ids"]


def _padded(rows: Any, pad_token_id: int) -> tuple[Tensor, Tensor]:
    if isinstance(rows, list | tuple) and rows and isinstance(rows[0], int):
        rows = [rows]
    if not (
        isinstance(rows, list | tuple)
        and all(isinstance(row, list | tuple) for row in rows)
        and all(isinstance(i, int) for row in rows for i in row)
    ):
        raise DataError(
            "expected token ids, a tensor [B, T], one list of them or several, or what a tokenizer "
            f"returns; got {type(rows).__name__}"
        )
    longest = max((len(row) for row in rows), default=0)
    if not all(len(row) for row in rows):
        raise DataError("a prompt has no tokens")
    padded = [[pad_token_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(padded), torch.tensor(mask)
