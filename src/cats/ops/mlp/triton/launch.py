"""Choose block shapes and launch the kernels."""

import contextlib
from dataclasses import dataclass
from functools import cache

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from cats.ops.mlp.arguments import GatedMLPArguments
from cats.ops.mlp.triton import kernels


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Shape of a launch: ``rows`` neurons per block, ``warps`` per program, ``programs`` in all."""

    rows: int
    warps: int
    programs: int


# By width of a row in elements: rows per block, warps per program, programs per processor. Measured
# on an H200 with one token and 16-bit weights (docs/kernels.md).
_MEASURED = {1024: (4, 4, 4), 2048: (2, 4, 4), 4096: (2, 4, 3), 8192: (1, 8, 2)}
# Outputs of one program, and inputs at once, where the router drops inputs; not measured yet.
_COLUMNS, _INPUTS = 128, 32
# Triton's interpreter pays for each operation, not for each byte: few programs, large blocks.
INTERPRETED = Plan(rows=32, warps=1, programs=2)


@cache
def plan(batch: int, hidden_size: int, neurons: int, itemsize: int, processors: int) -> Plan:
    """How ``[batch, D]`` goes through ``[F, D]``: a function of shapes and device, never of data.

    A program holds its input and its sums in registers, so a wide row or a large batch takes more
    warps and fewer rows.

    Args:
        itemsize: Bytes of one weight.
        processors: Streaming multiprocessors (compute units) of the device.
    """
    width = triton.next_power_of_2(hidden_size)
    if batch > 4:
        rows, warps, programs = 1, 16, 1
    elif batch > 2:
        rows, warps, programs = 2, min(16, max(4, width // 256)), 1
    elif batch > 1:
        rows, warps, programs = 1, min(16, max(4, width // 1024)), 2
    elif width > 8192:
        rows, warps, programs = 1, 16, 1
    else:
        rows, warps, programs = _MEASURED[max(1024, width)]
    rows = max(1, rows * 2 // itemsize)
    # each program writes a sum of D elements, which should be few compared with the weights
    most = triton.cdiv(neurons, 2 * rows)
    return Plan(rows=rows, warps=warps, programs=min(processors * programs, most))


def gated_mlp(arguments: GatedMLPArguments) -> Tensor:
    """See :func:`cats.ops.gated_mlp`."""
    x = arguments.x
    batch, D = x.shape
    F = arguments.gate.shape[0]
    routing, routing_bias, other, other_bias = arguments.by_role()
    shape = plan(batch, D, F, x.itemsize, processors(x.device)) if x.is_cuda else INTERPRETED
    partial = torch.empty(shape.programs, batch, D, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    # Triton launches on the current device, which may not be that of x
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        dependent = _launches_dependents(x.device)
        options = dict(BATCH=batch, DEPENDENT=dependent, num_stages=1)
        if dependent:
            options["launch_pdl"] = True
        sums = None
        if arguments.input_thresholds is not None:
            sums = torch.empty(batch, F, dtype=torch.float32, device=x.device)
            kernels.sum_columns[(triton.cdiv(F, _COLUMNS),)](
                x,
                routing,
                arguments.input_thresholds,
                sums,
                D,
                F,
                ROWS=_INPUTS,
                BLOCK_F=_COLUMNS,
                num_warps=4,
                **options,
            )
        kernels.stream_neurons[(shape.programs,)](
            x,
            routing,
            other,
            arguments.down,
            arguments.thresholds,
            routing_bias,
            other_bias,
            arguments.product_thresholds,
            sums,
            partial,
            D,
            F,
            ACTIVATION=arguments.activation,
            GATE_ROUTES=arguments.router == "gate",
            ROWS=shape.rows,
            BLOCK_D=triton.next_power_of_2(D),
            num_warps=shape.warps,
            **options,
        )
        kernels.add_partials[(triton.cdiv(D, 32), batch)](
            partial,
            arguments.down_bias,
            out,
            shape.programs,
            D,
            ROWS=64,
            BLOCK_D=32,
            num_warps=4,
            **options,
        )
    return out


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _launches_dependents(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one before it drains (NVIDIA, Hopper onwards)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
