"""How much of the weights single tokens read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from torch import Tensor, nn

from cats.decode.rows.row import Row
from cats.decode.tracing import exclusion, shadow_of
from cats.fusion import take_out_
from cats.model import CatsActivation, find_gated_mlps
from cats.model.traffic import token_bytes

# A counted step runs module by module, which takes longer than others.
EVERY = 8


class ReadCounter:
    """Counts the neurons that a pass drops, on a copy of the modules that shares the weights.

    Attributes:
        model: The copy. Its sparse MLPs are not fused, since an operator does not say what it
            drops.
    """

    def __init__(self, model: nn.Module) -> None:
        with exclusion.tracing():  # while nothing runs, since modules are copied
            self.model = shadow_of(model)
            take_out_(self.model)
            self._acts = {
                name.rpartition(".")[0]: module
                for name, module in self.model.named_modules()
                if isinstance(module, CatsActivation)
            }
            whole = token_bytes(self.model)
            # the share of a token's bytes that a dropped neuron of each MLP saves
            self._savings = {
                mlp.name: (mlp.bytes - mlp.bytes_read(1.0)) / whole
                for mlp in (find_gated_mlps(self.model, names=self._acts) if self._acts else ())
            }

    def run(self, forward: Callable[[nn.Module], Tensor]) -> tuple[Tensor, float]:
        """What a pass gives, and the share of the dense model's bytes that its token read.

        Args:
            forward: Runs one token through a model.
        """
        dropped: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name in self._savings:
                act = self._acts[name]
                handle = act.register_forward_hook(
                    lambda module, args, output, name=name: dropped.update({name: output == 0})
                )
                hooks.callback(handle.remove)
            logits = forward(self.model)
        saved = sum(self._savings[name] * float(d.float().mean()) for name, d in dropped.items())
        return logits, 1 - saved


def most_overdue(rows: Sequence[Row]) -> Row | None:
    """The row whose reads are to be counted: one per step, since it delays all others."""
    due = [(row.started - row.counts_at, row) for row in rows if row.counts_at is not None]
    overdue, row = max(due, key=lambda pair: pair[0], default=(-1, None))
    return row if overdue >= 0 else None
