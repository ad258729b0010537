"""Chooses block shapes and launches the kernels."""

import contextlib
from dataclasses import dataclass
from functools import cache

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from cats.ops.triton import kernels


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Shape of a launch: a function of shapes and device, never of data.

    ``rows`` neurons a block, ``warps`` a program, ``programs`` in all.
    """

    rows: int
    warps: int
    programs: int


# Triton's interpreter pays for each operation, not for each byte: few programs, large blocks.
_INTERPRETED = Plan(rows=32, warps=1, programs=2)


@cache
def plan(batch: int, hidden_size: int, neurons: int, itemsize: int, processors: int) -> Plan:
    """The block shapes for ``[batch, D]`` and ``[F, D]`` of ``itemsize`` bytes an element.

    A program holds a row of weights a token in registers, 32 elements a thread at most; blocks of
    rows are as large as the registers then allow, so that enough bytes are in flight.
    """
    width = triton.next_power_of_2(hidden_size)
    elements = 32 if batch == 1 else max(8, 64 // batch)
    warps = min(16, max(1, width // (32 * elements)))
    rows = 2 if itemsize == 4 or batch > 2 else 4
    programs = processors * max(1, 12 // warps)
    # each program writes a sum of D elements: keep that small beside the weights
    programs = min(programs, triton.cdiv(neurons, 2 * rows))
    return Plan(rows=rows, warps=warps, programs=programs)


def gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    thresholds: Tensor,
    activation: str,
    router: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    product_thresholds: Tensor | None,
) -> Tensor:
    """See :func:`cats.ops.gated_mlp`."""
    batch, D = x.shape
    F = gate.shape[0]
    routing, other, routing_bias, other_bias = (
        (gate, up, gate_bias, up_bias) if router == "gate" else (up, gate, up_bias, gate_bias)
    )
    shape = plan(batch, D, F, x.itemsize, _processors(x.device)) if x.is_cuda else _INTERPRETED
    partial = torch.empty(shape.programs, batch, D, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    # Triton launches on the current device, which may be another one
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        kernels.stream_neurons[(shape.programs,)](
            x, routing, other, down, thresholds, routing_bias, other_bias, product_thresholds,
            partial, D, F,
            ACTIVATION=activation, GATE_ROUTES=router == "gate", BATCH=batch, ROWS=shape.rows,
            BLOCK_D=triton.next_power_of_2(D), num_warps=shape.warps, num_stages=1,
        )  # fmt: skip
        kernels.add_partials[(triton.cdiv(D, 32), batch)](
            partial, down_bias, out, shape.programs, D,
            BATCH=batch, ROWS=64, BLOCK_D=32, num_warps=4, num_stages=1,
        )  # fmt: skip
    return out


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
