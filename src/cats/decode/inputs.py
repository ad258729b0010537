"""Prompts as users write them, to one batch padded on the left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cats.errors import DataError
from cats.protocols import Tokenizer

Prompts = (
    Tensor
    | np.ndarray[Any, Any]
    | Mapping[str, Any]
    | Sequence[int]
    | Sequence[Sequence[int]]
    | str
    | Sequence[str]
)


def batch_of(
    inputs: Prompts,
    attention_mask: object,
    *,
    pad_token_id: int,
    vocabulary: int,
    infer_mask: bool = False,
    tokenizer: Tokenizer | None = None,
) -> tuple[Tensor, Tensor]:
    """Token ids and mask of prompts, ``[B, T]`` each, int64 and bool, on the inputs' device.

    Args:
        inputs: Ids ``[B, T]`` of torch or numpy, what a tokenizer returns, one list of ids, or
            several lists, which are padded to one length. With a tokenizer also texts.
        attention_mask: ``[B, T]``, 0 where a row is padded on its left, or where a token is left
            out. None if there is no such position.
        pad_token_id: Fills up rows of different lengths.
        vocabulary: Number of ids that the model knows.
        infer_mask: Whether ``pad_token_id`` in a tensor without a mask is padding.
        tokenizer: Makes ids of texts.

    Raises:
        DataError: If there are no tokens, an id is not of the vocabulary, or the mask does not
            fit.
    """
    rows: Any = _ids_of_texts(inputs, tokenizer)
    if isinstance(inputs, Mapping):
        if "input_ids" not in inputs:
            raise DataError(f"expected input_ids among {', '.join(map(str, inputs)) or 'nothing'}")
        rows = inputs["input_ids"]
        attention_mask = inputs.get("attention_mask") if attention_mask is None else attention_mask
    if isinstance(rows, np.ndarray) and rows.dtype != object:
        rows = torch.tensor(rows)
    if not isinstance(rows, Tensor):
        rows, is_token = _padded(rows, pad_token_id)
        attention_mask = _mask_of_lists(attention_mask, is_token)
        infer_mask = False
    ids: Tensor = rows[None] if rows.ndim == 1 else rows
    if ids.ndim != 2 or ids.numel() == 0:
        raise DataError(f"expected token ids [B, T] with at least one, got {list(ids.shape)}")
    expected = f"expected token ids from 0 to {vocabulary - 1}, the model's vocabulary"
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise DataError(f"{expected}, got {ids.dtype}")
    ids = ids.long()
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise DataError(f"{expected}, got {int(ids.min())} to {int(ids.max())}")
    if attention_mask is None:
        mask = ids != pad_token_id if infer_mask else torch.ones_like(ids, dtype=torch.bool)
        if not mask[:, -1].all():
            raise DataError(
                f"a prompt ends in pad_token_id={pad_token_id}, which is padding: pad on the left, "
                "or give an attention_mask"
            )
        return ids, mask
    mask = torch.as_tensor(attention_mask)
    if not ((mask == 0) | (mask == 1)).all():
        raise DataError("expected an attention_mask of 0 and 1")
    mask = mask.bool().reshape(mask.shape[-2:] if ids.shape[0] > 1 else (1, -1))
    if mask.shape != ids.shape:
        raise DataError(f"expected a mask {list(ids.shape)}, got {list(mask.shape)}")
    if not mask[:, -1].all():
        raise DataError(
            "expected no padding on the right: set tokenizer.padding_side = 'left', or give "
            "lists of ids"
        )
    return ids, mask.to(ids.device)


def _ids_of_texts(inputs: Prompts, tokenizer: Tokenizer | None) -> Any:
    """Lists of ids instead of texts; anything else unchanged."""
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


def _padded(rows: object, pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, ``[B, T]`` each, of one list of ids or of several."""
    rows = _lists(rows)
    if isinstance(rows, list) and rows and isinstance(rows[0], int):
        rows = [rows]
    if not (
        isinstance(rows, list)
        and all(isinstance(row, list) for row in rows)
        and all(isinstance(i, int) and not isinstance(i, bool) for row in rows for i in row)
    ):
        raise DataError(
            "expected token ids, a tensor [B, T], one list of them or several, or what a tokenizer "
            f"returns; got {type(rows).__name__}"
        )
    longest = max((len(row) for row in rows), default=0)
    if not all(len(row) for row in rows):
        raise DataError("a prompt has no tokens")
    padded = [[pad_token_id] * (longest - len(row)) + row for row in rows]
    mask = [[False] * (longest - len(row)) + [True] * len(row) for row in rows]
    return torch.tensor(padded), torch.tensor(mask)


def _mask_of_lists(attention_mask: object, is_token: Tensor) -> Tensor:
    """The mask ``[B, T]`` of lists that were padded here.

    Args:
        attention_mask: One number per token of the lists, where a tokenizer has padded them; or
            None.
        is_token: Whether a position holds a token of the lists, ``[B, T]``.
    """
    if attention_mask is None:
        return is_token
    rows = _lists(attention_mask)
    rows = [rows] if isinstance(rows, list) and rows and not isinstance(rows[0], list) else rows
    if not isinstance(rows, list) or list(map(len, rows)) != is_token.sum(1).tolist():
        raise DataError("expected a mask with one number for each token of the lists")
    longest = is_token.shape[1]
    return torch.tensor([[0] * (longest - len(row)) + row for row in rows])


def _lists(values: Any) -> Any:
    """Lists of Python's numbers instead of tuples, arrays and tensors."""
    if isinstance(values, Tensor | np.ndarray | np.generic):
        return values.tolist()
    if isinstance(values, list | tuple):
        return [value if type(value) is int else _lists(value) for value in values]
    return values
