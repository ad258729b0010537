"""Prompts in every form that users have them, as one batch padded on the left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cats.errors import DataError

Prompts = Tensor | Mapping[str, Any] | Sequence[int] | Sequence[Sequence[int]]


def batch_of(
    inputs: Prompts, attention_mask: Tensor | None, *, pad_token_id: int, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Token ids and mask of prompts, ``[B, T]`` each, int64 and bool, on the inputs' device.

    Args:
        inputs: Ids ``[B, T]``, what a tokenizer returns, one list of ids, or several of any
            lengths, which are then padded.
        attention_mask: ``[B, T]``, 0 where a row is padded on its left; None where it is not.
        pad_token_id: Fills up rows of different lengths.
        vocabulary: Ids must be below.

    Raises:
        DataError: If there are no tokens, or they or the mask cannot be right.
    """
    rows: Any = inputs
    if isinstance(inputs, Mapping):
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


def _padded(rows: Sequence[Any], pad_token_id: int) -> tuple[Tensor, Tensor]:
    if rows and isinstance(rows[0], int):
        rows = [rows]
    longest = max((len(row) for row in rows), default=0)
    if not all(len(row) for row in rows):
        raise DataError("a prompt has no tokens")
    padded = [[pad_token_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(padded), torch.tensor(mask)
