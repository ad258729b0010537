"""Choose block shapes and launch the kernels."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cache

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from cats.errors import UnsupportedModelError
from cats.ops.packed_linear.arguments import PackedLinearArguments
from cats.ops.packed_linear.triton import kernels
from cats.ops.quantised import ColumnLayout, RowLayout, ZeroMode

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Shape of a program: ``rows`` at once, ``units`` of each, in ``warps`` warps."""

    rows: int
    units: int
    tokens: int
    warps: int = 4
    stages: int = 4


# Triton's interpreter pays for each operation, not for each byte: few programs, large blocks.
_INTERPRETED = Plan(rows=32, units=4, tokens=1)


def plan(batch: int, rows: int) -> Plan:
    """How ``[batch, columns]`` goes through ``rows`` packed rows: never a function of data.

    Few rows make few programs, so that each takes fewer rows and more bytes of each at once.
    """
    if batch > 1:
        return Plan(rows=32, units=1, tokens=16, stages=3)
    return Plan(rows=16, units=4, tokens=1) if rows >= 8192 else Plan(rows=4, units=16, tokens=1)


@cache
def codes_of(layout: RowLayout | ColumnLayout, arithmetic: torch.dtype) -> kernels.Codes:
    """What kernels want to know of a layout.

    Raises:
        UnsupportedModelError: If the kernels do not compute in ``arithmetic``.
    """
    if arithmetic not in TYPES:
        names = ", ".join(map(str, TYPES))
        raise UnsupportedModelError(f"the arithmetic is {arithmetic}, expected one of {names}")
    return kernels.Codes(
        parts=8 // layout.bits,
        group_size=layout.group_size,
        scale=TYPES[layout.scale_dtype],
        scale_bytes=layout.scale_dtype.itemsize,
        has_zeros=layout.zero_mode == ZeroMode.ZEROS,
        has_shifts=layout.zero_mode == ZeroMode.SHIFTS,
        zero=layout.zero,
        arithmetic=TYPES[arithmetic],
        padded=isinstance(layout, RowLayout) and layout.width > layout.columns,
    )


def aligned(packed: Tensor) -> Tensor:
    """The same bytes where scales can be read as numbers: a copy where they begin elsewhere."""
    return packed if packed.data_ptr() % 16 == 0 else packed.clone()


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes ``device`` the current one, where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def packed_linear(arguments: PackedLinearArguments) -> Tensor:
    """See :func:`cats.ops.packed_linear.packed_linear`."""
    x, rows, bias, layout, arithmetic = arguments
    batch, count = len(x), len(rows)
    shape = _INTERPRETED if batch == 1 and not x.is_cuda else plan(batch, count)
    out = x.new_empty(batch, count)
    with on(x.device):
        kernels.packed_linear[(triton.cdiv(count, shape.rows),)](
            x,
            aligned(rows),
            bias,
            out,
            batch,
            count,
            layout.columns,
            layout.pitch,
            CODES=codes_of(layout, arithmetic),
            ROWS=shape.rows,
            UNITS=shape.units,
            TOKENS=shape.tokens,
            STAGES=shape.stages,
            num_warps=shape.warps,
            enable_fp_fusion=True,
        )
    return out


def dequantise_rows(
    rows: Tensor, layout: RowLayout, arithmetic: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """See :func:`cats.ops.packed_linear.triton.dequantise_rows`."""
    out = torch.empty(len(rows), layout.columns, dtype=dtype, device=rows.device)
    codes = codes_of(layout, arithmetic)
    rows_at_once, units = 16, 4
    grid = (
        triton.cdiv(len(rows), rows_at_once),
        triton.cdiv(layout.code_bytes, 64 * units),
    )
    if not len(rows):
        return out
    with on(rows.device):
        kernels.dequantise_rows[grid](
            aligned(rows),
            out,
            len(rows),
            layout.columns,
            layout.pitch,
            CODES=codes,
            ROWS=rows_at_once,
            UNITS=units,
            num_warps=4,
            # a product and a sum in one operation would round once instead of twice
            enable_fp_fusion=False,
        )
    return out
