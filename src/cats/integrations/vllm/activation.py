"""The activation of a sparse MLP in vLLM: from stacked gate and up to their thresholded product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cats.errors import ModelMismatchError
from cats.integrations.vllm.block import Form
from cats.ops.mlp.dense import thresholded_product


class SparseActAndMul(nn.Module):
    """``keep(act(gate)) * up``, instead of an MLP's ``SiluAndMul`` or ``GeluAndMul``.

    Attributes:
        activation: A name of :data:`cats.functional.ACTIVATIONS`.
        router: The branch that is compared, ``"gate"`` or ``"up"``.
        threshold: ``[F]`` of this process, float32.
        product_threshold: ``[F]`` of this process, float32; None for methods without it.
        loaded: Names of the tensors that the checkpoint has filled.
    """

    threshold: nn.Parameter
    product_threshold: nn.Parameter | None

    def __init__(self, form: Form, activation: str, *, size: int, rank: int, ranks: int) -> None:
        """
        Args:
            form: What the method computes.
            activation: That of the dense model.
            size: F of this process.
            rank: Which of the equal parts of the neurons this process has.
            ranks: Number of parts.
        """
        super().__init__()
        self.activation, self.router = form.activation or activation, form.router
        self.loaded: set[str] = set()
        self._size, self._rank, self._ranks = size, rank, ranks
        self.register_parameter("product_threshold", None)
        for name in form.tensors:
            parameter = nn.Parameter(torch.zeros(size, dtype=torch.float32), requires_grad=False)
            parameter.weight_loader = self._loader(name)  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)

    def forward(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return thresholded_product(
            gate, up, self.threshold, self.activation, self.router, self.product_threshold
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}, router={self.router}, size={self._size}"

    def _loader(self, name: str):  # type: ignore[no-untyped-def]  # vLLM's protocol
        def load(parameter: nn.Parameter, stored: Tensor) -> None:
            total = self._size * self._ranks
            if stored.numel() not in (1, total):
                raise ModelMismatchError(
                    f"{name}: expected one number or {total}, one for each neuron; the checkpoint "
                    f"holds {list(stored.shape)}"
                )
            start = self._rank * self._size
            whole = stored.reshape(-1).float().expand(total)
            parameter.data.copy_(whole[start : start + self._size])
            self.loaded.add(name)

        return load
