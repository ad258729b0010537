"""Choose block shapes and launch the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from cats.ops.mlp.triton.kernels import add_partials
from cats.ops.packed_linear.triton.launch import TYPES, aligned, codes_of, on, processors
from cats.ops.packed_mlp.arguments import PackedMLPArguments
from cats.ops.packed_mlp.triton import kernels
from cats.ops.quantised import ColumnLayout, PackedColumns

# Neurons of a program of the last part; no more than the smallest usual group.
_SEGMENT = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Shapes of the programs: a function of sizes and device, never of data.

    Attributes:
        tokens: Of a block.
        rows: Neurons whose router a program of the first launch computes.
        row_units: Units of such rows that it reads at once.
        chunk: Kept neurons whose other branch it computes at once.
        chunk_units: Units of such rows that it reads at once.
        stages: Reads of rows that are on their way at once.
        columns: Kept neurons whose columns a program of the second launch reads at once.
        column_bytes: Of each column.
        splits: Programs of the second launch that share the neurons.
    """

    tokens: int
    rows: int
    row_units: int
    chunk: int
    chunk_units: int
    stages: int
    columns: int
    column_bytes: int
    splits: int


def plan(batch: int, neurons: int, columns: ColumnLayout, programs: int) -> Plan:
    """How ``batch`` tokens go through an MLP.

    Args:
        programs: Of the second launch, about; a few for each processor of the device.
    """
    column_bytes = 256
    blocks = triton.cdiv(columns.outputs * columns.bits, 8 * column_bytes)
    splits = max(1, min(programs // blocks, triton.cdiv(neurons, _SEGMENT)))
    one = batch == 1
    return Plan(
        tokens=1 if one else 16,
        rows=32,
        row_units=2 if one else 1,
        chunk=8 if one else 16,
        chunk_units=8 if one else 1,
        stages=3,
        columns=16,
        column_bytes=column_bytes,
        splits=splits,
    )


def packed_gated_mlp(arguments: PackedMLPArguments) -> Tensor:
    """See :func:`cats.ops.packed_mlp.packed_gated_mlp`."""
    a = arguments
    batch, neurons, hidden = len(a.x), len(a.gate), a.rows.columns
    gate, up = (aligned(a.gate), a.gate_bias), (aligned(a.up), a.up_bias)
    (routing, routing_bias), (other, other_bias) = (gate, up) if a.router == "gate" else (up, gate)
    # Triton's interpreter pays for each operation, not for each byte: few programs
    programs = 8 * processors(a.x.device) if a.x.is_cuda else 2
    shape = plan(batch, neurons, a.columns, programs)
    products = a.x.new_empty(batch, neurons, dtype=torch.float32)
    partial = a.x.new_empty(shape.splits, batch, hidden, dtype=torch.float32)
    out = torch.empty_like(a.x)
    column_bytes = hidden * a.columns.bits // 8
    with on(a.x.device):
        kernels.multiply_branches[(triton.cdiv(neurons, shape.rows),)](
            a.x,
            routing,
            other,
            a.thresholds,
            routing_bias,
            other_bias,
            a.product_thresholds,
            products,
            batch,
            neurons,
            hidden,
            a.rows.pitch,
            CODES=codes_of(a.rows, a.arithmetic),
            ACTIVATION=a.activation,
            GATE_ROUTES=a.router == "gate",
            ROWS=shape.rows,
            ROW_UNITS=shape.row_units,
            CHUNK=shape.chunk,
            CHUNK_UNITS=shape.chunk_units,
            TOKENS=shape.tokens,
            STAGES=shape.stages,
            num_warps=4,
            enable_fp_fusion=True,
        )
        grid = triton.cdiv(column_bytes, shape.column_bytes), shape.splits
        kernels.add_columns[grid](
            products,
            aligned(a.down),
            a.down_scales,
            a.down_extras,
            partial,
            batch,
            neurons,
            hidden,
            a.columns.pitch,
            CODES=codes_of(a.columns, a.arithmetic),
            NUMBER=TYPES[a.x.dtype],
            ONE_GROUP=_in_one_group(a.columns, _SEGMENT),
            SEGMENT=_SEGMENT,
            CHUNK=shape.columns,
            BYTES=shape.column_bytes,
            TOKENS=shape.tokens,
            num_warps=4,
            enable_fp_fusion=True,
        )
        add_partials[(triton.cdiv(hidden, 32), batch)](
            partial,
            a.down_bias,
            out,
            shape.splits,
            hidden,
            BATCH=batch,
            ROWS=64,
            BLOCK_D=32,
            DEPENDENT=False,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


def dequantise_columns(
    packed: PackedColumns, arithmetic: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """See :func:`cats.ops.packed_mlp.triton.dequantise_columns`."""
    layout, neurons = packed.layout, len(packed.columns)
    out = packed.columns.new_empty(layout.outputs, neurons, dtype=dtype)
    codes = codes_of(layout, arithmetic)
    if not neurons:
        return out
    columns, column_bytes = 32, 64
    used_bytes = layout.outputs * layout.bits // 8
    with on(out.device):
        kernels.dequantise_columns[
            triton.cdiv(neurons, columns), triton.cdiv(used_bytes, column_bytes)
        ](
            aligned(packed.columns),
            packed.scales.contiguous(),
            None if packed.extras is None else packed.extras.contiguous(),
            out,
            neurons,
            layout.outputs,
            layout.pitch,
            CODES=codes,
            ONE_GROUP=_in_one_group(layout, columns),
            COLUMNS=columns,
            BYTES=column_bytes,
            num_warps=4,
            # a product and a sum in one operation would round once instead of twice
            enable_fp_fusion=False,
        )
    return out


def _in_one_group(layout: ColumnLayout, columns: int) -> bool:
    """Whether so many columns, from a multiple of their number on, always share a group."""
    return layout.group_size % columns == 0
