"""The parts of a gated MLP: its matrices, its activation, its sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cats.errors import UnsupportedModelError
from cats.functional import ACTIVATIONS
from cats.model.activation import CatsActivation, activation_kind
from cats.model.linear import Linear
from cats.model.probe import Layout, inputs
from cats.model.slot import opened, place_
from cats.weights import Weight, input_threshold, weight_of
from cats.weights.placement import materialized


@dataclass(frozen=True, slots=True)
class GatedOperands:
    """The parts of a gated MLP that ``cats::gated_mlp`` takes, as they are now.

    Attributes:
        gate: ``[F, D]``.
        up: ``[F, D]``.
        down: ``[D, F]``.
        thresholds: ``[F]``, float32; in the memory of the activation's buffer if that is ``[F]``
            too. Zero for a dense MLP.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``.
        router: The branch that is compared with the thresholds.
        product_thresholds: ``[F]``, float32, compared with the product of both branches, the input
            of down; or None.
        gate_inputs: ``[D]``, float32, compared with the inputs of gate; or None.
        up_inputs: ``[D]``, float32, compared with the inputs of up; or None.
    """

    gate: Linear
    up: Linear
    down: Linear
    thresholds: Tensor
    activation: str
    router: str = "gate"
    product_thresholds: Tensor | None = None
    gate_inputs: Tensor | None = None
    up_inputs: Tensor | None = None


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """One gated MLP: ``down(act(gate(x)) * up(x))``, or a form that vanishes with the activation.

    Attributes:
        name: Name of the module in the model, such as ``"model.layers.0.mlp"``.
        module: The MLP itself; for a fused MLP, the original one.
        activation_name: Name of the activation module in it, such as ``"act_fn"``.
        activation: Its kind: ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``.
        hidden_size: ``D``.
        intermediate_size: ``F``, the number of neurons.
        layout: Which layers are gate, up and down; None where the probe could not tell.
        loose_act: The activation as a module, where that of the dense MLP is a function, or is
            named in its forward pass; else None.
    """

    name: str
    module: nn.Module
    activation_name: str
    activation: str
    hidden_size: int
    intermediate_size: int
    layout: Layout | None
    loose_act: nn.Module | None = None

    @property
    def act(self) -> nn.Module:
        """The activation module as it is now: that of a sparse MLP is a CatsActivation."""
        child = self.module._modules.get(self.activation_name, self.loose_act)
        assert child is not None
        return child

    @property
    def dense_act(self) -> nn.Module:
        """The activation of the dense model."""
        return self.act.dense if isinstance(self.act, CatsActivation) else self.act

    def replace_act(self, act: nn.Module) -> None:
        place_(self.module, self.activation_name, act, self.layout)

    def opened(self) -> AbstractContextManager[None]:
        """Within the block, the activation of the dense MLP is a child that can be hooked."""
        return opened(self.module, self.activation_name, self.loose_act, self.layout)

    @property
    def size(self) -> str:
        """How many thresholds it may have, for messages."""
        return f"{self.intermediate_size} neurons"

    def fits(self, threshold: Tensor) -> bool:
        """Whether a threshold is one number, or one per neuron."""
        return threshold.numel() == 1 or threshold.shape == (self.intermediate_size,)

    @property
    def matrices(self) -> dict[str, Weight]:
        """Name of each linear layer to its matrix: three, or two where gate and up are stacked."""
        layers = ((name, weight_of(child)) for name, child in self.module.named_children())
        return {name: weight for name, weight in layers if weight is not None}

    @property
    def gate(self) -> Linear:
        return self._gate_or_up(is_gate=True)

    @property
    def up(self) -> Linear:
        return self._gate_or_up(is_gate=False)

    @property
    def down(self) -> Linear:
        return self._linear(self.known_layout().down)

    @property
    def bytes(self) -> int:
        """Bytes of the matrices: a token of the dense MLP reads all of them."""
        return sum(matrix.bytes for matrix in self.matrices.values())

    def bytes_read(self, dropped: float) -> float:
        """Bytes of the matrices that a token reads on average.

        All of the router is read, and the rows or columns of kept neurons of the other two.

        Args:
            dropped: Share of the neurons that is dropped.
        """
        neurons, columns = self.intermediate_size, self.hidden_size
        # gate and up have the same size, and so do their halves of a stacked layer
        router = next(
            matrix.row_bytes * neurons
            for matrix in self.matrices.values()
            if matrix.shape in ((neurons, columns), (2 * neurons, columns))
        )
        return router + (1 - dropped) * (self.bytes - router)

    def known_layout(self) -> Layout:
        """
        Raises:
            UnsupportedModelError: If the probe could not tell gate, up and down from each other.
        """
        if self.layout is None:
            raise UnsupportedModelError(
                f"{self.name}: it does not compute down(act(gate(x)) * up(x)) with linear layers"
            )
        return self.layout

    def operands(self) -> GatedOperands:
        """Gate, up, down, thresholds and the activation, as they are now.

        Raises:
            UnsupportedModelError: If the MLP has another form, or no kernel knows its activation.
        """
        sparse = self.act if isinstance(self.act, CatsActivation) else None
        act = self.act if sparse is None else sparse.act
        kind = activation_kind(act)
        if kind not in ACTIVATIONS:
            raise UnsupportedModelError(f"{self.name}: no kernel computes its activation {kind}")
        gate, up, down = self.gate, self.up, self.down
        threshold = torch.zeros(()) if sparse is None else sparse.threshold
        thresholds = threshold.to(down.matrix.device).expand(self.intermediate_size).contiguous()
        router = "gate" if sparse is None else sparse.router
        masks = (input_threshold(part.layer) for part in (down, gate, up))
        return GatedOperands(gate, up, down, thresholds, kind, router, *masks)

    def fingerprint(self) -> Tensor:
        """Some of the MLP's weights, ``[8]``, float32: the same in every dtype up to rounding.

        Raises:
            UnsupportedModelError: If the values of a weight cannot be read.
        """
        with materialized(self.module):
            entries = [m.entries(f"{self.name}.{name}") for name, m in self.matrices.items()]
        return torch.stack(entries).sum(0)

    def probe_inputs(self) -> Iterator[Tensor]:
        """Random hidden states ``[1, T, D]`` of small, unit and large scale, always the same."""
        return inputs(self.module, self.hidden_size)

    def _gate_or_up(self, *, is_gate: bool) -> Linear:
        layout = self.known_layout()
        layer = self._linear(layout.gate if is_gate else layout.up)
        if layout.gate != layout.up:
            return layer
        start = 0 if is_gate == layout.gate_first else self.intermediate_size
        return layer.part(start, start + self.intermediate_size)

    def _linear(self, name: str) -> Linear:
        return Linear.of(self.module.get_submodule(name), f"{self.name}.{name}")
