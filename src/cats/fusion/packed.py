"""One sparse MLP over quantised weights as one call of ``cats::packed_gated_mlp``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from cats.errors import ShapeError
from cats.fusion.base import FusedMLP, Layers
from cats.model import CatsActivation, GatedMLP
from cats.ops import is_unwatched
from cats.ops.packed_mlp import PackedMLPArguments, packed_gated_mlp
from cats.ops.packed_mlp.backends import BACKENDS
from cats.ops.packed_mlp.dense import packed_gated_mlp as dense_gated_mlp
from cats.ops.quantised import ColumnLayout, RowLayout
from cats.weights import INPUT_THRESHOLD, QuantisedLinear


class FusedPackedMLP(FusedMLP):
    """A sparse MLP over packed codes that runs as one operator."""

    def __init__(self, mlp: GatedMLP, backend: str) -> None:
        super().__init__(mlp, backend)
        self._function: Callable[[PackedMLPArguments], Tensor] = dense_gated_mlp

    @property
    def quantised_layers(self) -> list[QuantisedLinear]:
        """The layers that hold codes: gate and up, or both in one, then down."""
        names = dict.fromkeys((self.layout.gate, self.layout.up, self.layout.down))
        children = (self._modules[name] for name in names)
        return [child for child in children if isinstance(child, QuantisedLinear)]

    def pack_(self) -> None:
        """Store the codes as kernels read them, in place."""
        *routers, down = self.quantised_layers
        for layer in routers:
            layer.pack_rows_()
        down.pack_columns_()

    def _run(self, rows: Tensor, layers: Layers, act: CatsActivation) -> Tensor:
        gate, up, down = cast(tuple[QuantisedLinear, QuantisedLinear, QuantisedLinear], layers)
        if rows.dtype != gate.dtype:
            raise ShapeError(
                f"this MLP computes in {gate.dtype}, got {rows.dtype}: convert the input, or call "
                "model.to(dtype)"
            )
        gate_rows, up_rows = gate._buffers["packed"], up._buffers["packed"]
        columns, scales = down._buffers["packed"], down._buffers["packed_scales"]
        # what the layers' layouts say, which _layers has checked
        assert gate_rows is not None
        assert up_rows is not None
        assert columns is not None
        assert scales is not None
        if gate is up:
            gate_rows, up_rows = self._halves(gate_rows)
        arguments = PackedMLPArguments(
            rows.contiguous(),
            gate_rows,
            up_rows,
            columns,
            scales,
            down._buffers["packed_extras"],
            self._thresholds(act),
            self.activation,
            cast(RowLayout, gate.layout),
            cast(ColumnLayout, down.layout),
            gate.arithmetic,
            self.router,
            *self._biases(layers),
            down._buffers.get(INPUT_THRESHOLD),
        )
        if is_unwatched(rows):
            return self._run_unwatched(arguments)
        return packed_gated_mlp(arguments, self.backend)

    def _run_unwatched(self, arguments: PackedMLPArguments) -> Tensor:
        """The backend's function without torch's dispatcher; equal calls are checked once."""
        # x itself is new in each call
        key = (
            self.backend,
            torch.get_deterministic_debug_mode(),
            (arguments.x.shape, arguments.x.dtype, arguments.x.data_ptr() % 16),
            *(
                (part.data_ptr(), part.shape, part.dtype) if isinstance(part, Tensor) else part
                for part in arguments[1:]
            ),
        )
        if key != self._checked_call:
            self._function = BACKENDS.checked(arguments, self.backend)
            self._checked_call = key
        return self._function(arguments)

    def _router_operands(self, layers: Layers) -> tuple[Tensor, Tensor | None]:
        index = 0 if self.router == "gate" else 1
        layer = cast(QuantisedLinear, layers[index])
        numbers = layer.stored.dequantised()
        if layers[0] is layers[1]:
            numbers = self._halves(numbers)[index]
        return numbers, self._biases(layers)[index]

    def _is_as_fused(self, layers: Layers) -> bool:
        gate, up, down = cast(tuple[QuantisedLinear, QuantisedLinear, QuantisedLinear], layers)
        is_packed = isinstance(gate.layout, RowLayout) and isinstance(down.layout, ColumnLayout)
        return is_packed and gate.layout == up.layout and gate.dtype == up.dtype == down.dtype


@contextmanager
def packed_unless_error(mlps: Iterable[FusedPackedMLP]) -> Iterator[None]:
    """Pack the layers of MLPs, in place; if that or the block fails, they are as before.

    Unlike :func:`cats.undo.unchanged_on_error`, it keeps no plain tensors beside the packed ones.
    """
    packed: list[QuantisedLinear] = []
    try:
        for mlp in mlps:
            packed += [layer for layer in mlp.quantised_layers if layer.layout is None]
            mlp.pack_()
        yield
    except BaseException:
        for layer in packed:
            layer.unpack_()
        raise
