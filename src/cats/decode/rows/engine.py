"""What the scheduler asks of an engine: pieces of prompts, and steps of rows of any lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from cats.decode.rows.row import Row


class RowEngine(Protocol):
    """Runs rows over lines of one cache. One thread uses it.

    Attributes:
        lag: How many steps may start before the host reads the tokens of an earlier one.
        lines: Lines of its cache.
        capacity: Slots of a line.
        device: Of the model's inputs.
    """

    lag: int
    lines: int
    capacity: int
    device: torch.device

    def prefill(self, row: Row, count: int) -> Tensor | None:
        """Run the next ``count`` tokens of a row's prompt, from ``row.done`` on.

        Returns:
            The first new token, ``[1]``, int64, after the last token of the prompt; None before.
        """

    def step(self, rows: Sequence[Row]) -> Tensor:
        """Run the newest token of each row at ``row.position``, and choose the next one.

        If it raises, nothing has changed, and it may be called again with fewer rows.

        Returns:
            The chosen tokens, ``[len(rows)]``, int64, on the model's device; -1 where none can be
            drawn.
        """

    def counted_step(self, row: Row) -> tuple[Tensor, float]:
        """:meth:`step` of one row, and the share of the dense model's weights that it read.

        It may take longer than other steps.
        """

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        """Copy the slots ``start`` to ``stop`` of one line to another line."""

    def clear(self, line: int, start: int, stop: int) -> None:
        """Zero these slots of a line."""

    def forget(self) -> None:
        """The structure of the model has changed: what was made of it is of no use."""

    def free(self) -> None:
        """Free the cache; the engine is not used any more."""

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it."""
