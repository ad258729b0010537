"""Times of quantised gated MLPs: ``python -m tests.ops.mlp.time_quantised --output PATH``.

A chain of launches in a CUDA graph, each of which may start while the one before drains, over
weights that no cache holds. Each result is a line of JSON: microseconds per launch, and the share
of the best read of this run at which the bytes that it must read came.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from cats.benchmarks.timing import read_bandwidth, time_passes
from cats.ops.cuda.arguments import address
from cats.ops.cuda.device import multiprocessors
from cats.ops.cuda.residual import Residual
from cats.ops.mlp.cuda import quantised
from cats.ops.quantised import ColumnLayout, PackedColumns, PackedRows, RowLayout

CHAIN, ROTATED_BYTES, READ_BYTES = 24, 400 * 2**20, 4 * 2**30
SHAPES = [(4096, 14336), (4096, 11008), (2048, 8192)]


def packed(bits: int, group_size: int, hidden: int, neurons: int):
    """Random codes of one MLP; small scales that are all the same."""
    zero = 2 ** (bits - 1)
    scale_dtype = torch.bfloat16
    layout = RowLayout(
        bits=bits, columns=hidden, group_size=group_size, scale_dtype=scale_dtype, zero=zero
    )
    rows = []
    for _ in range(2):
        data = torch.randint(0, 256, (neurons, layout.pitch), dtype=torch.uint8, device="cuda")
        scales = torch.full((neurons, layout.groups), 0.5 / zero / hidden**0.5, dtype=scale_dtype)
        start = layout.code_bytes
        data[:, start : start + 2 * layout.groups] = scales.view(torch.uint8).cuda()
        rows.append(PackedRows(data, layout, neurons))
    columns = ColumnLayout(
        bits=bits, outputs=hidden, group_size=group_size, scale_dtype=scale_dtype, zero=zero
    )
    data = torch.randint(0, 256, (neurons, columns.pitch), dtype=torch.uint8, device="cuda")
    scales = torch.full(
        (columns.groups_of(neurons), hidden), 1e-4, dtype=scale_dtype, device="cuda"
    )
    return rows[0], rows[1], PackedColumns(data, scales, None, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--bits", nargs="*", type=int, default=[4, 8])
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of them")
    parser.add_argument("--ring-bytes", type=int, help="of the ring, instead of its own")
    options = parser.parse_args()
    if options.ring_bytes is not None:
        # private: only this script tries other sizes
        quantised._RING_BYTES = options.ring_bytes
    device = torch.device("cuda")
    read = READ_BYTES / read_bandwidth(device, size=READ_BYTES, rounds=10).median
    for bits in options.bits:
        group_size = 128 if bits == 4 else 0
        for hidden, neurons in SHAPES[: options.shapes]:
            size = 3 * neurons * hidden * bits / 8
            count = max(CHAIN, -(-ROTATED_BYTES // int(size)))
            mlps = [packed(bits, group_size, hidden, neurons) for _ in range(count)]
            x = torch.randn(hidden, device=device)
            norm = torch.ones(hidden, dtype=torch.bfloat16, device=device)
            sums = torch.zeros(hidden, device=device)
            residual = Residual(base=address(x), weight=address(norm), epsilon=1e-5)
            thresholds = {
                sparsity: torch.full((neurons,), value, device=device)
                for sparsity, value in thresholds_of(mlps[0]).items()
            }
            passes = {}
            for sparsity, threshold in thresholds.items():
                launches = [launch(mlp, residual, threshold, sums) for mlp in mlps]

                def run(launches=launches) -> None:
                    stream = torch.cuda.current_stream().cuda_stream
                    for i, item in enumerate(launches):
                        item.function.launch(
                            item.arguments, blocks=item.blocks, stream=stream, dependent=i > 0
                        )

                passes[sparsity] = run
            for sparsity, timing in time_passes(passes, count, device=device, rounds=25).items():
                scales = 2 * neurons * (hidden / group_size if group_size else 1)
                all_bytes = 3 * (neurons * hidden * bits / 8 + scales)
                needed = all_bytes * (1 + 2 * (1 - sparsity)) / 3
                line = {
                    "bits": bits,
                    "hidden": hidden,
                    "neurons": neurons,
                    "sparsity": sparsity,
                    "us": timing.median * 1e6,
                    "us_low": timing.low * 1e6,
                    "us_high": timing.high * 1e6,
                    "share": needed / read / timing.median,
                    "read_tb_per_s": read / 1e12,
                }
                print(json.dumps(line), flush=True)
                with options.output.open("a") as file:
                    file.write(json.dumps(line) + "\n")


def launch(mlp, residual, thresholds, sums):
    gate, up, down = mlp
    return quantised.launch(
        x=residual,
        gate=gate,
        up=up,
        down=down,
        thresholds=thresholds,
        activation="silu",
        gate_bias=None,
        up_bias=None,
        dtype=torch.bfloat16,
        sums=sums,
        multiprocessors=multiprocessors(0),
    )


def thresholds_of(mlp) -> dict[float, float]:
    """Thresholds for a share of neurons: codes are uniform, so the gate is nearly normal."""
    half = 2.0 ** (mlp[0].layout.bits - 1)
    deviation = 0.5 / 3**0.5 * (1 - 1 / (4 * half * half)) ** 0.5
    gate = torch.randn(2**20, device="cuda") * deviation
    values = torch.nn.functional.silu(gate).abs().sort().values
    shares = (0.0, 0.5, 0.7)
    return {s: float(values[int(s * len(values))]) if s else 0.0 for s in shares}


if __name__ == "__main__":
    main()
