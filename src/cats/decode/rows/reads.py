"""How much of the weights single tokens read."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from cats.decode.tracing import exclusion, shadow_of
from cats.fusion import take_out_
from cats.metrics import DroppedNeurons
from cats.model import find_gated_mlps, is_sparse
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
            whole = token_bytes(self.model)
            # the share of a token's bytes that a dropped neuron of each MLP saves
            self._savings = {
                mlp.name: (mlp.bytes - mlp.bytes_read(1.0)) / whole
                for mlp in (find_gated_mlps(self.model) if is_sparse(self.model) else ())
            }

    def run(self, forward: Callable[[nn.Module], Tensor]) -> tuple[Tensor, float]:
        """What a pass gives, and the share of the dense model's bytes that its token read.

        Args:
            forward: Runs one token through a model.
        """
        if not self._savings:
            return forward(self.model), 1.0
        with DroppedNeurons(self.model) as dropped:
            output = forward(self.model)
        saved = sum(share * self._savings[name] for name, share in dropped.shares().items())
        return output, 1 - saved
