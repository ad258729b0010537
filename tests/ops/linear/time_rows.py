"""Times of linear layers of several tokens: ``python -m tests.ops.linear.time_rows --output PATH``.

A chain of launches in a CUDA graph, each of which may start while the one before drains, over
weights that no cache holds. Each result is a line of JSON: microseconds per launch, and the share
of the best read of this run at which the bytes of the weights came. Outputs are checked before
anything is timed. The line of ``linear`` is the kernel of one token, without a norm.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cats.benchmarks.timing import read_bandwidth, time_passes
from cats.ops.cuda import rows_input
from cats.ops.cuda.device import multiprocessors
from cats.ops.cuda.function import Launch
from cats.ops.cuda.rows_input import TOKENS
from cats.ops.linear import cuda, rows

_CHAIN = 24
_ROTATED_BYTES = 800 * 2**20
_READ_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Shape:
    name: str
    rows: tuple[int, ...]
    columns: int


SHAPES = [
    Shape("mistral qkv", (4096, 1024, 1024), 4096),
    Shape("mistral o", (4096,), 4096),
    Shape("mistral gate", (14336,), 4096),
    Shape("mistral head", (32768,), 4096),
    Shape("llama-1b qkv", (2048, 512, 512), 2048),
    Shape("llama-1b o", (2048,), 2048),
    Shape("llama-1b head", (128256,), 2048),
]


class Bench:
    def __init__(
        self,
        device: torch.device,
        *,
        rounds: int = 15,
        chain: int = _CHAIN,
        rotated_bytes: int = _ROTATED_BYTES,
        read_bytes: int = _READ_BYTES,
    ) -> None:
        self._device, self._rounds = device, rounds
        self._chain, self._rotated_bytes = chain, rotated_bytes
        self._multiprocessors = multiprocessors(0)
        seconds = read_bandwidth(device, size=read_bytes, rounds=max(2, rounds // 2)).median
        self.read = read_bytes / seconds

    def measure(self, shape: Shape, tokens: tuple[int, ...]) -> Iterator[dict[str, object]]:
        """Times with each number of tokens, with tickets; then those of one token's own kernel."""
        size = 2.0 * sum(shape.rows) * shape.columns
        count = max(2, min(self._chain, -(-self._rotated_bytes // int(size))))
        weights = [
            [self._random(n, shape.columns, scale=shape.columns**-0.5) for n in shape.rows]
            for _ in range(count)
        ]
        counters = torch.zeros(count, 2, dtype=torch.int32, device=self._device)
        kept: list[Tensor] = []  # launches hold only addresses
        passes: dict[tuple[str, int], Callable[[], object]] = {}
        for number in tokens:
            x = self._random(number, shape.columns)
            out = torch.empty(number, sum(shape.rows), device=self._device)
            kept += [x, out]
            launches = [
                launch
                for matrices, counter in zip(weights, counters, strict=True)
                for launch in rows.launches(
                    matrices,
                    [None] * len(matrices),
                    x=x,
                    out=out,
                    counters=counter,
                    multiprocessors=self._multiprocessors,
                )
            ]
            per_matrix = len(launches) // count
            counters.zero_()
            self._start(launches[:per_matrix])
            expected = x.float() @ torch.cat(weights[0]).float().t()
            error = ((out - expected).norm() / expected.norm()).item()
            assert error < 1e-4, f"{number} tokens: error {error:.1e}"
            passes["linear_rows", number] = self._pass(launches, counters)
        x, out = self._random(shape.columns), torch.empty(sum(shape.rows), device=self._device)
        launches = [
            cuda.launch(matrices, [None] * 3, x=x, out=out, multiprocessors=self._multiprocessors)
            for matrices in weights
        ]
        passes["linear", 1] = self._pass(launches, counters)
        timings = time_passes(passes, count, device=self._device, rounds=self._rounds)
        for (kernel, number), timing in timings.items():
            yield {
                "kernel": kernel,
                "shape": shape.name,
                "rows": sum(shape.rows),
                "columns": shape.columns,
                "tokens": number,
                "launches": count,
                "us": timing.median * 1e6,
                "us_low": timing.low * 1e6,
                "us_high": timing.high * 1e6,
                "share": size / self.read / timing.median,
                "read_tb_per_s": self.read / 1e12,
            }

    def _random(self, *size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, device=self._device, dtype=torch.bfloat16) * scale

    def _pass(self, launches: list[Launch], counters: Tensor) -> Callable[[], object]:
        def run() -> None:
            counters.zero_()
            self._start(launches)

        return run

    def _start(self, launches: list[Launch]) -> None:
        gpu = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device).cuda_stream if gpu else 0
        for i, launch in enumerate(launches):
            launch.function.launch(
                launch.arguments, blocks=launch.blocks, stream=stream, dependent=i > 0
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shapes", nargs="*", default=[shape.name for shape in SHAPES])
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, help="of a chunk, 8 or 16, instead of the own choice")
    parser.add_argument("--part-bytes", type=int, help="of a row, at most")
    parser.add_argument("--ring-bytes", type=int, help="of the ring")
    parser.add_argument("--early-bytes", type=int, help="on their way before the input is there")
    options = parser.parse_args()
    tried = try_sizes(rows, options)
    bench = Bench(torch.device("cuda"), rounds=options.rounds)
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "tried": tried}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("a") as file:
        for shape in SHAPES:
            if shape.name not in options.shapes:
                continue
            for line in bench.measure(shape, tuple(options.tokens)):
                print(json.dumps(line | about), file=file, flush=True)
                values = (line[key] for key in _SHOWN)
                print(*(f"{v:.4}" if isinstance(v, float) else v for v in values), flush=True)


_SHOWN = "shape", "kernel", "tokens", "us", "share"


def try_sizes(module: object, options: argparse.Namespace) -> dict[str, int]:
    """Set the sizes that the options name, in ``module`` and in what all kernels of rows share."""
    # private: only scripts that measure try other sizes
    names = {
        "rows": (rows_input, "ROWS_OF_CHUNK"),
        "part_bytes": (rows_input, "_PART_BYTES"),
        "early_bytes": (module, "_EARLY_BYTES"),
        "ring_bytes": (module, "_RING_BYTES"),
    }
    tried = {name: getattr(options, name) for name in names if getattr(options, name)}
    for name, value in tried.items():
        owner, attribute = names[name]
        setattr(owner, attribute, value)
        if name == "ring_bytes":
            module._RING_BYTES_ALONE = value
    return tried


if __name__ == "__main__":
    main()
