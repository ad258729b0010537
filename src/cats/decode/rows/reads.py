"""How much of the weights single tokens read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from cats.decode.rows.row import Row
from cats.decode.tracing import exclusion, shadow_of
from cats.fusion import ReadShares, take_out_
from cats.model import is_sparse
from cats.model.traffic import token_bytes
from cats.weights import weight_of

# A counted step runs module by module, which takes longer than others.
EVERY = 8


class ReadCounter:
    """Counts what the masks of a pass keep, on a copy of the modules that shares the weights.

    Attributes:
        model: The copy. Its sparse MLPs are not fused, since an operator does not say what it
            drops.
    """

    def __init__(self, model: nn.Module) -> None:
        with exclusion.tracing():  # while nothing runs, since modules are copied
            self.model = shadow_of(model)
            take_out_(self.model)
            self._reads = ReadShares(self.model) if is_sparse(self.model) else None
            whole = token_bytes(self.model)
            # the share of a token's bytes that is in each linear layer
            self._shares = {
                name: weight.bytes / whole
                for name, module in self.model.named_modules()
                if (weight := weight_of(module)) is not None
            }

    def run(self, forward: Callable[[nn.Module], Tensor]) -> tuple[Tensor, float]:
        """What a pass gives, and the share of the dense model's bytes that its token read.

        Args:
            forward: Runs one token through a model.
        """
        if self._reads is None:
            return forward(self.model), 1.0
        self._reads.clear()
        with self._reads:
            logits = forward(self.model)
        read = self._reads.shares()
        return logits, 1 - sum(self._shares[name] * (1 - share) for name, share in read.items())


def most_overdue(rows: Sequence[Row]) -> Row | None:
    """The row whose reads are to be counted: one per step, since it delays all others."""
    due = [(row.started - row.counts_at, row) for row in rows if row.counts_at is not None]
    overdue, row = max(due, key=lambda pair: pair[0], default=(-1, None))
    return row if overdue >= 0 else None
