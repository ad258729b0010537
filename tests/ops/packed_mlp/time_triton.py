"""Times of the Triton kernels of packed codes: ``python -m tests.ops.packed_mlp.time_triton``.

Beside them, in the same run: a dense MLP in bfloat16, and the backend ``dense``, which writes the
matrices out. Each result is a line of JSON; results are compared with ``dense`` before. Weights
rotate, so that no cache holds them, and calls are replayed in a CUDA graph.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from cats.benchmarks.timing import cache_size, time_passes
from cats.ops.packed_linear import PackedLinearArguments, dense, triton
from cats.ops.packed_mlp import PackedMLPArguments
from cats.ops.packed_mlp import dense as mlp_dense
from cats.ops.packed_mlp import triton as mlp_triton
from cats.ops.quantised import ColumnLayout, RowLayout

GROUPS = {4: 128, 8: 0}
BATCHES = 1, 2, 4, 8, 16
SPARSITIES = 0.0, 0.5, 0.7
DTYPE = torch.bfloat16


def random_rows(layout: RowLayout, count: int, device: torch.device) -> Tensor:
    """Random codes, and one scale for all: numbers about 1 over the square root of the columns."""
    rows = torch.randint(0, 256, (count, layout.pitch), dtype=torch.uint8, device=device)
    scale = 2 / 2**layout.bits / layout.columns**0.5
    scales = torch.full((layout.padded_groups,), scale, dtype=layout.scale_dtype, device=device)
    data = scales.view(torch.uint8)
    rows[:, layout.code_bytes : layout.code_bytes + len(data)] = data
    return rows


def random_mlp(bits: int, hidden: int, neurons: int, device: torch.device) -> PackedMLPArguments:
    """One MLP that keeps all neurons of one token."""
    zero, group_size = 2 ** (bits - 1), GROUPS[bits]
    shared = dict(bits=bits, group_size=group_size, scale_dtype=torch.bfloat16, zero=zero)
    rows, columns = RowLayout(columns=hidden, **shared), ColumnLayout(outputs=hidden, **shared)
    shape = neurons, columns.pitch
    return PackedMLPArguments(
        x=torch.randn(1, hidden, device=device).to(DTYPE),
        gate=random_rows(rows, neurons, device),
        up=random_rows(rows, neurons, device),
        down=torch.randint(0, 256, shape, dtype=torch.uint8, device=device),
        down_scales=torch.full(
            (columns.groups_of(neurons), hidden),
            2 / 2**bits / neurons**0.5,
            dtype=torch.bfloat16,
            device=device,
        ),
        down_extras=None,
        thresholds=torch.zeros(neurons, device=device),
        activation="silu",
        rows=rows,
        columns=columns,
        arithmetic=torch.bfloat16,
    )


def threshold_at(mlp: PackedMLPArguments, sparsity: float) -> Tensor:
    """Thresholds that drop a share of the neurons of this token."""
    gate = dense.dequantised(mlp.gate, mlp.rows, mlp.arithmetic, DTYPE)
    sizes = F.silu(F.linear(mlp.x[:1], gate)).float().abs().flatten().sort().values
    value = sizes[int(sparsity * len(sizes))] if sparsity else 0.0
    return torch.full_like(mlp.thresholds, float(value))


def check(found: Tensor, expected: Tensor, what: str) -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    if not error < 2e-2:
        raise SystemExit(f"{what}: the relative error is {float(error):.1e}")


def each(function: Callable[..., object], calls: list[object]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            function(call)

    return run


def linear_passes(mlps: list[PackedMLPArguments], batch: int) -> dict[str, Callable[[], None]]:
    first = mlps[0]
    x = first.x[:1].repeat(batch, 1)
    calls = [PackedLinearArguments(x, m.gate, None, m.rows, m.arithmetic) for m in mlps]
    check(triton.packed_linear(calls[0]), dense.packed_linear(calls[0]), f"linear, batch {batch}")
    return {
        f"linear triton batch {batch}": each(triton.packed_linear, calls),
        f"linear dense batch {batch}": each(dense.packed_linear, calls),
    }


def mlp_passes(
    mlps: list[PackedMLPArguments], batch: int, sparsity: float
) -> dict[str, Callable[[], None]]:
    thresholds = threshold_at(mlps[0], sparsity)
    # one token again and again keeps the share of neurons that some token keeps
    x = mlps[0].x[:1].repeat(batch, 1)
    calls = [m._replace(x=x, thresholds=thresholds) for m in mlps]
    found, expected = (f.packed_gated_mlp(calls[0]) for f in (mlp_triton, mlp_dense))
    what = f"batch {batch} sparsity {sparsity}"
    # near the thresholds, the rounding of the branches decides what is kept
    if not sparsity:
        check(found, expected, what)
    passes = {f"mlp triton {what}": each(mlp_triton.packed_gated_mlp, calls)}
    if not sparsity:
        passes[f"mlp dense {what}"] = each(mlp_dense.packed_gated_mlp, calls)
    return passes


def writing_passes(mlps: list[PackedMLPArguments]) -> dict[str, Callable[[], None]]:
    return {
        "write rows": each(
            lambda m: triton.dequantise_rows(m.gate, m.rows, m.arithmetic, DTYPE), mlps
        ),
        "write columns": each(
            lambda m: mlp_triton.dequantise_columns(m.packed_down, m.arithmetic, DTYPE), mlps
        ),
    }


def unquantised_passes(
    hidden: int, neurons: int, copies: int, device: torch.device
) -> dict[str, Callable[[], None]]:
    """An MLP and a linear layer in bfloat16, by torch."""
    shapes = (neurons, hidden), (neurons, hidden), (hidden, neurons)
    sets = [[torch.randn(s, device=device).to(DTYPE) for s in shapes] for _ in range(copies)]
    passes: dict[str, Callable[[], None]] = {}
    for batch in BATCHES:
        x = torch.randn(batch, hidden, device=device).to(DTYPE)

        def mlp(weights: list[Tensor], x: Tensor = x) -> Tensor:
            gate, up, down = weights
            return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

        def linear(weights: list[Tensor], x: Tensor = x) -> Tensor:
            return F.linear(x, weights[0])

        passes[f"mlp bfloat16 batch {batch}"] = each(mlp, sets)
        passes[f"linear bfloat16 batch {batch}"] = each(linear, sets)
    return passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--neurons", type=int, default=14336)
    parser.add_argument("--bits", nargs="*", type=int, default=[4, 8])
    parser.add_argument("--batches", nargs="*", type=int, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--copies", type=int, help="of the weights, instead of enough")
    parser.add_argument("--output", type=Path, help="JSON lines are appended")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("it needs a GPU: times of Triton's interpreter say nothing")
    device = torch.device("cuda")
    hidden, neurons = options.hidden, options.neurons
    # one matrix of each copy, which the linear layers read, should pass the cache several times
    matrix = neurons * hidden // 2
    copies = options.copies or max(2, -(-4 * cache_size(device) // matrix))

    def report(bits: int, passes: dict[str, Callable[[], None]], count: int) -> None:
        for name, timing in time_passes(
            passes, count, device=device, rounds=options.rounds
        ).items():
            us = timing.scaled(1e6)
            line = dict(bits=bits, what=name, hidden=hidden, neurons=neurons)
            line |= dict(us=us.median, us_low=us.low, us_high=us.high)
            print(json.dumps(line), flush=True)
            if options.output:
                with options.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")

    few = max(1, copies // 4)
    report(16, unquantised_passes(hidden, neurons, few, device), few)
    for bits in options.bits:
        mlps = [random_mlp(bits, hidden, neurons, device) for _ in range(copies)]
        report(bits, writing_passes(mlps), copies)
        for batch in options.batches:
            passes = linear_passes(mlps, batch)
            for sparsity in SPARSITIES:
                passes |= mlp_passes(mlps, batch, sparsity)
            report(bits, passes, copies)


if __name__ == "__main__":
    main()
