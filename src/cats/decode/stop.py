"""Texts that end a row, looked for on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cats.errors import ConfigError


class StopStrings:
    """Watches the new text of each row for one of several strings."""

    def __init__(self, strings: tuple[str, ...], tokenizer: Any, batch: int) -> None:
        """
        Raises:
            ConfigError: If there is no tokenizer.
        """
        if tokenizer is None:
            raise ConfigError("stop_strings need the tokenizer: pass tokenizer=...")
        self._strings = strings
        self._tokenizer = tokenizer
        self._rows: list[list[int]] = [[] for _ in range(batch)]
        # a token has at least one byte, but some bytes only become text with those before them
        self._reach = max(len(s.encode()) for s in strings) + 8

    def add(self, tokens: Tensor) -> Tensor:
        """Take a token a row, ``[B]``; returns which rows contain a string now, ``[B]``, bool."""
        hits = []
        for row, token in zip(self._rows, tokens.tolist(), strict=True):
            row.append(token)
            text = self._tokenizer.decode(row[-self._reach :])
            hits.append(any(s in text for s in self._strings))
        return torch.tensor(hits)
