"""Choose block shapes and launch the kernels."""

import contextlib

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from cats.ops.experts.arguments import ExpertsArguments
from cats.ops.experts.triton import kernels
from cats.ops.mlp.triton.launch import INTERPRETED, plan, processors


def gated_experts(arguments: ExpertsArguments) -> Tensor:
    """See :func:`cats.ops.experts.gated_experts`."""
    x, index, shares, gate_up, down, thresholds, activation = arguments
    tokens, D = x.shape
    F, places, pairs = arguments.neurons, index.shape[1], index.numel()
    shape = plan(1, D, F, x.itemsize, processors(x.device)) if x.is_cuda else INTERPRETED
    # the pairs share the processors
    programs = max(1, shape.programs // pairs)
    partial = torch.empty(programs, pairs, D, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    # Triton launches on the current device, which may not be that of x
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        kernels.stream_experts[(programs, pairs)](
            x,
            index,
            gate_up,
            down,
            thresholds,
            partial,
            D,
            F,
            arguments.experts,
            PLACES=places,
            ACTIVATION=activation,
            ROWS=shape.rows,
            BLOCK_D=triton.next_power_of_2(D),
            num_warps=shape.warps,
            num_stages=1,
        )
        block = 128
        kernels.add_experts[(triton.cdiv(D, block), tokens)](
            partial, shares, out, programs, pairs, D, PLACES=places, BLOCK_D=block, num_warps=4
        )
    return out
