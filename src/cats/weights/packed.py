"""Quantised matrices in the order in which kernels read them: packed rows, and columns of down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from cats.errors import UnsupportedModelError
from cats.ops.packed_linear.dense import dequantised as dequantised_rows
from cats.ops.packed_mlp import dequantise_columns
from cats.ops.quantised import (
    ColumnLayout,
    PackedColumns,
    PackedRows,
    RowLayout,
    ZeroMode,
    pack_columns,
    pack_rows,
    unpack_columns,
    unpack_rows,
)
from cats.weights.base import Order, Weight
from cats.weights.codes import Quantised

# Groups that kernels read, those of 16 on a CPU alone. A larger group becomes several of these with
# the same scale.
_GROUP_SIZES = 16, 32, 64, 128
_GROUP_SIZES_OF_GPUS = 32, 64, 128


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class Packed(Weight):
    """The numbers of a :class:`Quantised` matrix, its codes in the order of kernels.

    Attributes:
        matrix: Codes, scales and zero points.
        group_size: Columns of a group of the checkpoint; all of them where a row has one scale.
            Packed rows of larger groups than kernels read repeat scales.
        arithmetic: As in :class:`Quantised`.
        dtype: Of the numbers.
    """

    storage = "quantised"

    matrix: PackedRows | PackedColumns
    group_size: int
    arithmetic: torch.dtype
    dtype: torch.dtype

    @classmethod
    def of(cls, layer: nn.Module) -> Self | None:
        # that module imports this one
        from cats.weights.quantised import QuantisedLinear

        stored = layer.stored if type(layer) is QuantisedLinear else None
        return stored if isinstance(stored, cls) else None

    @classmethod
    def rows_of(cls, weight: Quantised, name: str = "the matrix") -> Self:
        """A copy in packed rows.

        Args:
            weight: The numbers.
            name: Of the matrix, for messages.

        Raises:
            UnsupportedModelError: If no kernel reads such rows.
        """
        layout = row_layout(weight, name)
        scales, zeros, shifts = (
            _repeated(table, weight, layout)
            for table in (weight.scales, weight.zeros, weight.shifts)
        )
        assert scales is not None
        rows = pack_rows(layout, weight.codes, scales, zeros=zeros, shifts=shifts)
        return cls(
            matrix=PackedRows(rows, layout, len(rows)),
            group_size=weight.group_size,
            arithmetic=weight.arithmetic,
            dtype=weight.dtype,
        )

    @classmethod
    def columns_of(cls, weight: Quantised, name: str = "the matrix") -> Self:
        """A copy in packed columns; arguments and errors as for :meth:`rows_of`."""
        columns = pack_columns(
            column_layout(weight, name),
            weight.codes,
            weight.scales,
            neurons=weight.columns,
            zeros=weight.zeros,
            shifts=weight.shifts,
        )
        return cls(
            matrix=columns,
            group_size=weight.group_size,
            arithmetic=weight.arithmetic,
            dtype=weight.dtype,
        )

    @property
    def layout(self) -> RowLayout | ColumnLayout:
        return self.matrix.layout

    @property
    def shape(self) -> tuple[int, int]:
        matrix = self.matrix
        if isinstance(matrix, PackedRows):
            return matrix.count, matrix.layout.columns
        return matrix.layout.outputs, len(matrix.columns)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        matrix = self.matrix
        if isinstance(matrix, PackedRows):
            return (matrix.rows,)
        stored = matrix.columns, matrix.scales, matrix.extras
        return tuple(tensor for tensor in stored if tensor is not None)

    @property
    def order(self) -> Order | None:
        return "rows" if isinstance(self.matrix, PackedRows) else "columns"

    @property
    def bytes(self) -> int:
        # those of codes, scales and zero points, as before they were packed: without padding
        (rows, columns), layout = self.shape, self.layout
        scale = layout.scale_dtype.itemsize
        extra = {ZeroMode.CONSTANT: 0, ZeroMode.ZEROS: 1, ZeroMode.SHIFTS: scale}
        groups = -(-columns // self.group_size)
        codes = columns if layout.bits == 8 else -(-columns // 2)
        return rows * (codes + groups * (scale + extra[layout.zero_mode]))

    def dequantised(self) -> Tensor:
        matrix = self.matrix
        if isinstance(matrix, PackedRows):
            return dequantised_rows(matrix.rows, matrix.layout, self.arithmetic, self.dtype)
        return dequantise_columns(matrix, self.arithmetic, self.dtype)

    def part(self, start: int, stop: int) -> Self:
        matrix = self.matrix
        if not isinstance(matrix, PackedRows):
            raise UnsupportedModelError(f"{self!r} is packed by columns: its rows are no memory")
        rows = matrix.rows[start:stop]
        return type(self)(
            matrix=PackedRows(rows, matrix.layout, len(rows)),
            group_size=self.group_size,
            arithmetic=self.arithmetic,
            dtype=self.dtype,
        )

    def take(self, order: Tensor) -> Self:
        """The rows of these numbers, copied, in this order.

        Raises:
            UnsupportedModelError: If they are packed by columns.
        """
        matrix = self.matrix
        if not isinstance(matrix, PackedRows):
            raise UnsupportedModelError(f"{self!r} is packed by columns: its rows are no memory")
        rows = matrix.rows[order]
        return type(self)(
            matrix=PackedRows(rows, matrix.layout, len(rows)),
            group_size=self.group_size,
            arithmetic=self.arithmetic,
            dtype=self.dtype,
        )

    def unpacked(self) -> Quantised:
        """A copy of the same codes, scales and zero points as checkpoints store them."""
        matrix, layout, columns = self.matrix, self.layout, self.shape[1]
        if isinstance(matrix, PackedRows):
            codes, *tables = unpack_rows(matrix.layout, matrix.rows)
            # each scale of a larger group was repeated
            times = self.group_size // (matrix.layout.group_size or self.group_size)
        else:
            codes, *tables = unpack_columns(matrix)
            times = 1
        scales, zeros, shifts = (
            None if table is None else table[:, ::times].contiguous() for table in tables
        )
        assert scales is not None
        return Quantised(
            codes=codes,
            scales=scales,
            bits=layout.bits,
            columns=columns,
            group_size=self.group_size,
            zeros=zeros,
            zero=layout.zero,
            shifts=shifts,
            arithmetic=self.arithmetic,
            dtype=self.dtype,
        )

    def __repr__(self) -> str:
        (rows, columns), size = self.shape, self.group_size
        scaling = "a scale per row" if size >= columns else f"groups of {size}"
        return f"<int{self.layout.bits} weight [{rows}, {columns}], {scaling}, packed {self.order}>"


def row_layout(weight: Quantised | Packed, name: str = "the matrix") -> RowLayout:
    """How kernels read the rows of a matrix.

    Raises:
        UnsupportedModelError: If none reads them; the message says why, with the name.
    """
    if isinstance(weight, Packed):
        layout = weight.layout
        return layout if isinstance(layout, RowLayout) else row_layout(weight.unpacked(), name)
    _check(weight, name)
    size = 0 if weight.groups == 1 else weight.group_size
    sizes = _GROUP_SIZES_OF_GPUS if weight.codes.is_cuda else _GROUP_SIZES
    if size and size not in sizes:
        # such as groups of 256: the same scale for two groups of 128
        size = next((size for size in reversed(sizes) if weight.group_size % size == 0), 0)
        if not size:
            raise UnsupportedModelError(
                f"{name} is {weight!r}: kernels read groups of a multiple of {sizes[0]} columns"
            )
    return RowLayout(
        bits=weight.bits,
        columns=weight.columns,
        group_size=size,
        scale_dtype=weight.scales.dtype,
        zero_mode=_zero_mode(weight),
        zero=0 if weight.zeros is not None else weight.zero,
    )


def column_layout(weight: Quantised | Packed, name: str = "the matrix") -> ColumnLayout:
    """How kernels read the columns of a matrix; errors as for :func:`row_layout`."""
    if isinstance(weight, Packed):
        layout = weight.layout
        return (
            layout if isinstance(layout, ColumnLayout) else column_layout(weight.unpacked(), name)
        )
    _check(weight, name)
    rows = weight.shape[0]
    if rows % 4:
        raise UnsupportedModelError(f"{name} is {weight!r}: kernels read a multiple of 4 outputs")
    return ColumnLayout(
        bits=weight.bits,
        outputs=rows,
        group_size=0 if weight.groups == 1 else weight.group_size,
        scale_dtype=weight.scales.dtype,
        zero_mode=_zero_mode(weight),
        zero=0 if weight.zeros is not None else weight.zero,
    )


def _check(weight: Quantised, name: str) -> None:
    if weight.codes.dtype != torch.uint8:
        raise UnsupportedModelError(f"{name} is {weight!r}: no kernel here reads float8 codes")
    if weight.column_order is not None:
        raise UnsupportedModelError(
            f"{name} is {weight!r} with its columns in another order (desc_act): quantise it "
            "without that to run kernels on it"
        )
    if weight.zeros is not None and weight.shifts is not None:
        raise UnsupportedModelError(f"{name} has zero points and shifts, expected one of them")


def _zero_mode(weight: Quantised) -> ZeroMode:
    if weight.zeros is not None:
        return ZeroMode.ZEROS
    return ZeroMode.CONSTANT if weight.shifts is None else ZeroMode.SHIFTS


def _repeated(table: Tensor | None, weight: Quantised, layout: RowLayout) -> Tensor | None:
    """A table of the groups of a matrix as one of the groups of its layout."""
    times = weight.group_size // (layout.group_size or weight.group_size)
    if table is None or times == 1:
        return table
    return table.repeat_interleave(times, dim=1)[:, : layout.groups].contiguous()
