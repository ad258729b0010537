"""Portable GPU backend: a Triton kernel multiplies codes as it reads them, another writes them out.

A program computes the numbers of a few rows of codes, exactly as the format of the checkpoint does,
and multiplies them with the inputs of all tokens; the matrix is never in memory.
"""

import importlib.util

import torch
from torch import Tensor

from cats.ops.packed_linear.arguments import PackedLinearArguments
from cats.ops.quantised import RowLayout

# Tokens of one product of tensor cores. From more on, writing the matrix out once is faster.
MAX_BATCH = 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unavailable() -> str | None:
    """Why it cannot run on this machine, or None. Triton's interpreter runs it on a CPU."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return "no GPU (on a CPU it runs, slowly, with TRITON_INTERPRET=1)"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "Triton needs a GPU of compute capability 8.0 or newer"
    return None


def refuses(arguments: PackedLinearArguments) -> str | None:
    """Why it leaves this call to another backend, or None."""
    return refuses_rows(arguments.x, arguments.rows, arguments.layout, arguments.arithmetic)


def refuses_rows(x: Tensor, rows: Tensor, layout: RowLayout, arithmetic: torch.dtype) -> str | None:
    """Why the kernels cannot multiply these rows with these inputs, or None."""
    if reason := layout.refused_by_gpus:
        return reason
    if x.device.type != "cuda" and not _interpreted():
        return f"it needs tensors on a GPU, these are on {x.device}"
    if rows.numel() == 0 or x.numel() == 0:
        return "a tensor is empty"
    if x.shape[0] > MAX_BATCH:
        return f"the batch {x.shape[0]} is larger than {MAX_BATCH}"
    for name, dtype in (("x", x.dtype), ("the arithmetic", arithmetic)):
        if dtype not in DTYPES:
            return f"{name} is {dtype}, expected one of {', '.join(map(str, DTYPES))}"
        if dtype == torch.bfloat16 and _interpreted():
            return f"Triton's interpreter does not compute with bfloat16 as a GPU does ({name})"
    return None


def packed_linear(arguments: PackedLinearArguments) -> Tensor:
    """See :func:`cats.ops.packed_linear.packed_linear`. One launch; sums in float32."""
    import cats.ops.packed_linear.triton.launch as launch

    return launch.packed_linear(arguments)


def dequantise_rows(
    rows: Tensor, layout: RowLayout, arithmetic: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """The numbers of packed rows, ``[N, columns]`` in ``dtype``, bit for bit those of the format.

    Args:
        rows: ``[N, layout.pitch]``, uint8, contiguous, on a GPU.
        layout: How a row is packed.
        arithmetic: What each operation rounds to: one of :data:`DTYPES`.
        dtype: Of the result, any floating-point one.
    """
    import cats.ops.packed_linear.triton.launch as launch

    return launch.dequantise_rows(rows, layout, arithmetic, dtype)


def _interpreted() -> bool:
    import triton  # type: ignore[import-untyped]

    return bool(triton.knobs.runtime.interpret)
