"""The tokens of a step on their way to the host, while later steps run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cats.decode.rows.row import Row


class Unread:
    """The tokens of one step, and what choosing them raised."""

    def __init__(self, rows: Sequence[Row], tokens: Tensor) -> None:
        """
        Args:
            rows: The rows of the step.
            tokens: What it has chosen, ``[len(rows)]``.
        """
        self._rows = rows
        # a later step may be chosen before this one is read, and may raise by itself
        self._errors = [row.choice.take_error() for row in rows]
        self._event: torch.cuda.Event | None = None
        if tokens.is_cuda:
            self._tokens = torch.empty_like(tokens, device="cpu", pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._tokens = tokens

    def __iter__(self) -> Iterator[tuple[Row, int, Exception | None]]:
        """Each row, its token, and what choosing it raised, when they are there."""
        if self._event is not None:
            self._event.synchronize()
        return zip(self._rows, self._tokens.tolist(), self._errors, strict=True)
