"""One sparse MLP as one call of the operator ``cats::gated_mlp``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from cats.fusion.base import FusedMLP, Layers, Matrices
from cats.model import CatsActivation, GatedMLP
from cats.ops import (
    GatedMLPArguments,
    call,
    checked,
    is_dense_batch,
    is_for_compiler,
    is_unwatched,
)
from cats.ops.mlp import dense
from cats.weights import INPUT_THRESHOLD, InputMask


class FusedGatedMLP(FusedMLP):
    """A sparse MLP over ordinary weights that runs as one operator.

    Attributes:
        strides: Name of each layer whose columns are contiguous once it is fused (down, and gate
            where it drops inputs) to shape and strides of its weight before ``fuse_``, which
            ``unfuse_`` restores.
    """

    def __init__(self, mlp: GatedMLP, backend: str) -> None:
        super().__init__(mlp, backend)
        self._function: Callable[[GatedMLPArguments], Tensor] = dense.gated_mlp
        gate = self._modules[self.layout.gate]
        by_columns = [
            self.layout.down,
            *([self.layout.gate] if isinstance(gate, InputMask) else []),
        ]
        self.strides = {name: (w.shape, w.stride()) for name, w in self._of(by_columns).items()}

    @property
    def column_weights(self) -> dict[str, nn.Parameter]:
        """Name of each layer of :attr:`strides` to its weight, as it is now."""
        return self._of(self.strides)

    def _of(self, layers: Iterable[str]) -> dict[str, nn.Parameter]:
        return {n: cast(nn.Parameter, cast(nn.Linear, self._modules[n]).weight) for n in layers}

    def operands(
        self,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Gate, up and down as the operator takes them, then their biases."""
        layers = self._layers()
        return *self._weights(layers), *self._biases(layers)

    def _run(self, rows: Tensor, layers: Layers, act: CatsActivation) -> Tensor:
        arguments = GatedMLPArguments(
            rows,
            *self._weights(layers),
            self._thresholds(act),
            self.activation,
            self.router,
            *self._biases(layers),
            layers[2]._buffers.get(INPUT_THRESHOLD),
            layers[0]._buffers.get(INPUT_THRESHOLD),
        )
        for_compiler = self.backend == "auto" and is_for_compiler() and not torch.is_grad_enabled()
        if for_compiler and is_dense_batch(rows):
            # as torch operators, which a compiler fuses with what is around them
            return dense.gated_mlp(arguments)
        if is_unwatched(rows):
            return self._run_unwatched(arguments)
        try:
            return call(arguments, self.backend)
        except RuntimeError:
            # a C++ kernel says less about what does not fit
            checked(arguments, self.backend)
            raise

    def _router_operands(self, layers: Layers) -> tuple[Tensor, Tensor | None]:
        index = 0 if self.router == "gate" else 1
        return self._weights(layers)[index], self._biases(layers)[index]

    def _weights(self, layers: Layers) -> Matrices:
        gate, up, down = map(_weight, layers)
        return (gate, up, down) if layers[0] is not layers[1] else (*self._halves(gate), down)

    def _run_unwatched(self, arguments: GatedMLPArguments) -> Tensor:
        """The backend's function without torch's dispatcher; equal calls are checked once."""
        rows, gate, up, down, thresholds = arguments[:5]
        products = arguments.product_thresholds
        inputs = arguments.input_thresholds
        biases = arguments.gate_bias, arguments.up_bias, arguments.down_bias
        key = (
            self.backend,
            (rows.shape, rows.dtype, rows.data_ptr() % 16),
            (gate.shape, gate.dtype, gate.data_ptr()),
            up.data_ptr(),
            (down.data_ptr(), down.stride(0)),
            thresholds.data_ptr(),
            *(t is None or (t.data_ptr(), t.shape, t.dtype) for t in (products, inputs, *biases)),
        )
        if key != self._checked_call:
            self._function = checked(arguments, self.backend)
            self._checked_call = key
        return self._function(arguments)


def _weight(layer: nn.Module) -> Tensor:
    # not as an attribute, which a module looks up in Python
    weight: Tensor = layer._parameters["weight"]  # type: ignore[assignment]  # never None
    return weight
