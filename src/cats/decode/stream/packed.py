"""Quantised matrices in the layouts that the kernels stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cats.decode.stream.spec import LayerSpec, ModelSpec
from cats.errors import UnsupportedModelError
from cats.model import GatedOperands, Linear
from cats.ops.quantised import (
    ColumnLayout,
    PackedColumns,
    PackedRows,
    RowLayout,
    ZeroMode,
    pack_columns,
    pack_rows,
)
from cats.weights import Quantised

# Groups that kernels read. A larger group becomes several of these with the same scale.
_GROUP_SIZES = 32, 64, 128


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A linear layer whose rows are packed.

    Attributes:
        rows: The matrix.
        bias: ``[rows]``, or None.
    """

    rows: PackedRows
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class PackedDown:
    """``down`` of an MLP, whose columns are packed."""

    columns: PackedColumns


Matrix: TypeAlias = Linear | PackedLinear


def packed(spec: ModelSpec) -> ModelSpec:
    """The same model with packed copies of its quantised matrices.

    Raises:
        UnsupportedModelError: If no kernel reads a matrix; the message names it.
    """
    layers = [_packed_layer(layer, index) for index, layer in enumerate(spec.layers)]
    return replace(spec, layers=layers, head=_packed_rows(spec.head, "the head"))


def versions(spec: ModelSpec) -> list[int]:
    """Numbers that change when a quantised matrix of a model is written, and only then."""
    return [tensor._version for tensor in _quantised_tensors(spec) if not tensor.is_inference()]


def pack_again(source: ModelSpec, target: ModelSpec) -> None:
    """Pack the matrices of a model into the memory of earlier packed ones, which graphs read."""
    for new, old in zip(_tensors(packed(source)), _tensors(target), strict=True):
        old.copy_(new)


def _quantised_tensors(spec: ModelSpec) -> Iterator[Tensor]:
    for layer in spec.layers:
        linears = layer.q, layer.k, layer.v, layer.o, layer.mlp.gate, layer.mlp.up, layer.mlp.down
        for linear in linears:
            if isinstance(linear.matrix, Quantised):
                yield from linear.matrix.tensors
    if isinstance(spec.head.matrix, Quantised):
        yield from spec.head.matrix.tensors


def _tensors(spec: ModelSpec) -> Iterator[Tensor]:
    """The tensors of all packed matrices, always in the same order."""
    for layer in spec.layers:
        matrices = layer.q, layer.k, layer.v, layer.o, layer.mlp.gate, layer.mlp.up, layer.mlp.down
        yield from (tensor for matrix in matrices for tensor in _tensors_of(matrix))
    yield from _tensors_of(spec.head)


def _tensors_of(matrix: object) -> Iterator[Tensor]:
    if isinstance(matrix, PackedLinear):
        yield matrix.rows.rows
    elif isinstance(matrix, PackedDown):
        columns = matrix.columns
        yield from (columns.columns, columns.scales)
        if columns.extras is not None:
            yield columns.extras


def packed_matrices(mlp: GatedOperands) -> tuple[PackedLinear, PackedLinear, PackedDown] | None:
    """Gate, up and down of an MLP that :func:`packed` has packed; None where they are dense."""
    # objects: a packed model has packed matrices where its description has linear layers
    matrices: tuple[object, ...] = mlp.gate, mlp.up, mlp.down
    match matrices:
        case PackedLinear() as gate, PackedLinear() as up, PackedDown() as down:
            return gate, up, down
        case _:
            return None


def count_of(matrix: Matrix) -> int:
    """How many rows a matrix has."""
    return matrix.rows.count if isinstance(matrix, PackedLinear) else matrix.matrix.shape[0]


def runs_of_layout(matrices: tuple[Matrix, ...]) -> Iterator[tuple[Matrix, ...]]:
    """Neighbouring matrices that one launch can take: dense ones, or packed ones of one layout."""
    run: tuple[Matrix, ...] = ()
    for matrix in matrices:
        if run and _layout_of(run[0]) != _layout_of(matrix):
            yield run
            run = ()
        run = (*run, matrix)
    yield run


def _layout_of(matrix: Matrix) -> RowLayout | None:
    return matrix.rows.layout if isinstance(matrix, PackedLinear) else None


def _packed_layer(layer: LayerSpec, index: int) -> LayerSpec:
    # Any: a layer of packed matrices has them where the description has linear layers
    changes: dict[str, Any] = {
        name: _packed_rows(getattr(layer, name), f"{name} of layer {index}")
        for name in ("q", "k", "v", "o")
    }
    mlp = layer.mlp
    quantised = [isinstance(part.matrix, Quantised) for part in (mlp.gate, mlp.up, mlp.down)]
    if any(quantised) and not all(quantised):
        raise UnsupportedModelError(
            f"gate, up and down of layer {index} are {mlp.gate.matrix!r}, {mlp.up.matrix!r} and "
            f"{mlp.down.matrix!r}, expected all of them quantised, or none"
        )
    if all(quantised):
        parts: dict[str, Any] = {
            "gate": _packed_rows(mlp.gate, f"gate of layer {index}"),
            "up": _packed_rows(mlp.up, f"up of layer {index}"),
            "down": _packed_down(mlp.down, f"down of layer {index}"),
        }
        if parts["gate"].rows.layout != parts["up"].rows.layout:
            raise UnsupportedModelError(
                f"gate and up of layer {index} are stored in two ways: "
                f"{mlp.gate.matrix!r} and {mlp.up.matrix!r}"
            )
        changes["mlp"] = replace(mlp, **parts)
    return replace(layer, **changes)


def _packed_rows(linear: Linear, name: str) -> Any:
    matrix = linear.matrix
    if not isinstance(matrix, Quantised):
        return linear
    _check(matrix, name)
    group_size, scales, zeros, shifts = _in_groups_of_kernels(matrix, name)
    layout = RowLayout(
        bits=matrix.bits,
        columns=matrix.columns,
        group_size=group_size,
        scale_dtype=scales.dtype,
        zero_mode=_zero_mode(matrix),
        zero=0 if zeros is not None else matrix.zero,
    )
    rows = pack_rows(layout, matrix.codes, scales, zeros=zeros, shifts=shifts)
    return PackedLinear(PackedRows(rows, layout, len(rows)), linear.bias)


def _packed_down(linear: Linear, name: str) -> PackedDown:
    matrix = linear.matrix
    assert isinstance(matrix, Quantised)
    _check(matrix, name)
    layout = ColumnLayout(
        bits=matrix.bits,
        outputs=len(matrix.codes),
        group_size=0 if matrix.groups == 1 else matrix.group_size,
        scale_dtype=matrix.scales.dtype,
        zero_mode=_zero_mode(matrix),
        zero=0 if matrix.zeros is not None else matrix.zero,
    )
    columns = pack_columns(
        layout,
        matrix.codes,
        matrix.scales,
        neurons=matrix.columns,
        zeros=matrix.zeros,
        shifts=matrix.shifts,
    )
    return PackedDown(columns)


def _check(matrix: Quantised, name: str) -> None:
    if matrix.codes.dtype != torch.uint8:
        raise UnsupportedModelError(f"{name} is {matrix!r}: no kernel here reads float8 codes")
    if matrix.column_order is not None:
        raise UnsupportedModelError(
            f"{name} is {matrix!r} with its columns in another order (desc_act): quantise it "
            "without that to run it in the engine stream"
        )
    if matrix.zeros is not None and matrix.shifts is not None:
        raise UnsupportedModelError(f"{name} has zero points and shifts, expected one of them")


def _zero_mode(matrix: Quantised) -> ZeroMode:
    if matrix.zeros is not None:
        return ZeroMode.ZEROS
    return ZeroMode.CONSTANT if matrix.shifts is None else ZeroMode.SHIFTS


def _in_groups_of_kernels(
    matrix: Quantised, name: str
) -> tuple[int, Tensor, Tensor | None, Tensor | None]:
    """Group size (0: a whole row is one group), scales, zeros and shifts."""
    tables = matrix.scales, matrix.zeros, matrix.shifts
    if matrix.groups == 1:
        return 0, *tables
    if matrix.group_size in _GROUP_SIZES:
        return matrix.group_size, *tables
    # such as groups of 256: the same scale for two groups of 128
    size = next((size for size in reversed(_GROUP_SIZES) if matrix.group_size % size == 0), 0)
    if not size:
        raise UnsupportedModelError(
            f"{name} is {matrix!r}: kernels read groups of a multiple of {_GROUP_SIZES[0]} columns"
        )
    times, count = matrix.group_size // size, -(-matrix.columns // size)
    scales, zeros, shifts = (
        None if table is None else table.repeat_interleave(times, dim=1)[:, :count].contiguous()
        for table in tables
    )
    assert scales is not None
    return size, scales, zeros, shifts
