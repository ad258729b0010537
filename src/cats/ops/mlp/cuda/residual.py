"""The MLP within a token: it reads the norm of a residual stream, and adds to the stream."""

from functools import cache

import torch
from torch import Tensor

from cats.errors import UnsupportedModelError
from cats.ops.cuda.arguments import address
from cats.ops.cuda.device import shared_memory
from cats.ops.cuda.function import Function, Launch
from cats.ops.cuda.residual import Residual
from cats.ops.mlp.cuda.arguments import MLPArguments
from cats.ops.mlp.cuda.launch import shares_of
from cats.ops.mlp.cuda.variant import Variant, variant_for

__all__ = ["launch"]


def launch(
    *,
    x: Residual,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    thresholds: Tensor,
    activation: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    sums: Tensor,
    counters: Tensor,
    multiprocessors: int,
    traced: bool = False,
) -> Launch:
    """Add the output of the MLP to ``sums``; operands are those of :func:`cats.ops.gated_mlp`.

    Args:
        x: The input, the norm of a residual stream.
        gate: ``[F, D]``, the router.
        up: ``[F, D]``.
        down: ``[D, F]``, column-major.
        thresholds: ``[F]``, float32.
        activation: A name of :data:`cats.functional.ACTIVATIONS`.
        gate_bias: ``[F]`` or None.
        up_bias: ``[F]`` or None.
        sums: ``[D]``, float32.
        counters: int32, set to zero by the first launch of a token.
        multiprocessors: How many the GPU has.
        traced: Whether warps write times.

    Raises:
        UnsupportedModelError: If a row is too long.
    """
    neurons, hidden = gate.shape
    function, variant = _function(gate.get_device(), hidden, gate.dtype, activation, traced)
    shares = shares_of(variant, neurons, multiprocessors, False)
    arguments = MLPArguments(
        router=address(gate),
        other=address(up),
        down=address(down),
        thresholds=address(thresholds, 1),
        router_bias=address(gate_bias, 1),
        other_bias=address(up_bias, 1),
        sums=address(sums),
        counters=address(counters),
        neurons=neurons,
        fixed_runs=shares.fixed_runs,
        long_tickets=shares.long_tickets,
        short_rows=shares.short_rows,
        gate_is_router=True,
        request_early=True,
        residual=x,
    )
    return Launch(function, arguments, shares.blocks)


@cache
def _function(
    device: int, hidden: int, dtype: torch.dtype, activation: str, traced: bool
) -> tuple[Function, Variant]:
    limit = shared_memory(device)
    variant = variant_for(hidden, dtype, 1, activation, shared_limit=limit, residual=True)
    if variant is None:
        raise UnsupportedModelError(f"a hidden size of {hidden} does not fit the MLP's kernel")
    function = Function(
        device,
        "mlp/cuda/gated_mlp.cu",
        variant.defines() | {"TRACE": int(traced)},
        threads=variant.threads,
        shared_bytes=variant.shared_bytes,
    )
    return function, variant
