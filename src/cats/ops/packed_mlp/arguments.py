"""The arguments of ``cats::packed_gated_mlp``, in one object that every backend takes."""

from typing import NamedTuple

import torch
from torch import Tensor

from cats.errors import ShapeError
from cats.functional import ACTIVATIONS
from cats.ops.mlp.arguments import ROUTERS
from cats.ops.packed_linear.arguments import check_packed, check_vector, check_x
from cats.ops.quantised import ColumnLayout, PackedColumns, RowLayout

__all__ = ["PackedMLPArguments"]


class PackedMLPArguments(NamedTuple):
    """A gated MLP whose matrices are stored in packed rows and columns of codes.

    Attributes:
        x: ``[B, D]``; bfloat16, float16 or float32.
        gate: ``[F, rows.pitch]``, uint8: packed rows of ``D`` columns.
        up: The same shape and layout.
        down: ``[F, columns.pitch]``, uint8: packed columns of ``D`` outputs, one per neuron.
        down_scales: ``[groups, D]`` in ``columns.scale_dtype``.
        down_extras: The same shape: zero points (uint8) or shifts (as the scales); None for none.
        thresholds: ``[F]``, float32, compared with the router's absolute output.
        activation: A name of :data:`cats.functional.ACTIVATIONS`.
        rows: How gate and up are packed.
        columns: How down is packed.
        arithmetic: The dtype in which the format of the checkpoint makes numbers of codes.
        router: ``"gate"`` or ``"up"``: the branch that is compared, of which all rows are read.
        gate_bias: ``[F]`` in the dtype of ``x``, or None.
        up_bias: ``[F]`` in the dtype of ``x``, or None.
        down_bias: ``[D]`` in the dtype of ``x``, or None.
        product_thresholds: ``[F]``, float32, or None; compared with the product of the branches.
    """

    x: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    down_scales: Tensor
    down_extras: Tensor | None
    thresholds: Tensor
    activation: str
    rows: RowLayout
    columns: ColumnLayout
    arithmetic: torch.dtype
    router: str = "gate"
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    product_thresholds: Tensor | None = None

    @property
    def packed_down(self) -> PackedColumns:
        return PackedColumns(self.down, self.down_scales, self.down_extras, self.columns)

    def check(self) -> None:
        """
        Raises:
            ShapeError: If a shape, dtype, device, layout or option does not fit.
        """
        x, rows, columns = self.x, self.rows, self.columns
        check_x(x, rows.columns)
        check_packed("gate", self.gate, rows.pitch, x.device)
        check_packed("up", self.up, rows.pitch, x.device)
        check_packed("down", self.down, columns.pitch, x.device)
        neurons = len(self.gate)
        if len(self.up) != neurons or len(self.down) != neurons or columns.outputs != rows.columns:
            raise ShapeError(
                f"gate has {neurons} rows of {rows.columns} columns, but up has {len(self.up)} "
                f"rows, and down {len(self.down)} columns of {columns.outputs} outputs"
            )
        # shapes and dtypes of the tables
        packed = self.packed_down
        for name, table in (("down_scales", packed.scales), ("down_extras", packed.extras)):
            if table is not None and (table.device != x.device or not table.is_contiguous()):
                raise ShapeError(
                    f"expected {name} contiguous on {x.device}, got strides {table.stride()} "
                    f"on {table.device}"
                )
        for name, size, dtype in (
            ("thresholds", neurons, torch.float32),
            ("product_thresholds", neurons, torch.float32),
            ("gate_bias", neurons, x.dtype),
            ("up_bias", neurons, x.dtype),
            ("down_bias", rows.columns, x.dtype),
        ):
            vector: Tensor | None = getattr(self, name)
            if vector is not None:
                check_vector(name, vector, size, dtype, x.device)
        if self.activation not in ACTIVATIONS:
            raise ShapeError(
                f"activation must be one of {', '.join(ACTIVATIONS)}; got {self.activation!r}"
            )
        if self.router not in ROUTERS:
            raise ShapeError(f"router must be one of {', '.join(ROUTERS)}; got {self.router!r}")
