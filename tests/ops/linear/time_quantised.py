"""Times of quantised linear layers: ``python -m tests.ops.linear.time_quantised --output PATH``.

A chain of launches in a CUDA graph, each of which may start while the one before drains, over
weights that no cache holds. Each result is a line of JSON: microseconds per launch, and the share
of the best read of this run at which the bytes of codes, scales and zero points came, without
padding. Outputs are checked before anything is timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cats.benchmarks.timing import Timing, read_bandwidth, time_passes
from cats.ops.cuda.arguments import address
from cats.ops.cuda.device import multiprocessors, shared_memory
from cats.ops.cuda.function import Launch
from cats.ops.cuda.residual import Residual
from cats.ops.linear import cuda, quantised
from cats.ops.quantised.rows import RowLayout, ZeroMode
from tests.ops.linear.quantised_cases import error_bound, make_layout, make_matrix

_CHAIN = 24
_ROTATED_BYTES = 400 * 2**20
_READ_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Shape:
    name: str
    rows: tuple[int, ...]
    columns: int
    normed: bool


@dataclass(frozen=True)
class Format:
    bits: int
    group_size: int
    zero_mode: ZeroMode = ZeroMode.CONSTANT
    scale_dtype: torch.dtype = torch.float16


SHAPES = [
    Shape("qkv", (4096, 1024, 1024), 4096, True),
    Shape("o", (4096,), 4096, False),
    Shape("gate", (14336,), 4096, True),
    Shape("down", (4096,), 14336, False),
]
FORMATS = [
    Format(4, 128),
    Format(4, 128, ZeroMode.ZEROS),
    Format(4, 32, ZeroMode.SHIFTS),
    Format(8, 0, scale_dtype=torch.float32),
    Format(8, 128),
]


def bytes_of(layout: RowLayout, rows: int) -> float:
    """Without padding."""
    extra = {
        ZeroMode.CONSTANT: 0,
        ZeroMode.ZEROS: 1,
        ZeroMode.SHIFTS: layout.scale_dtype.itemsize,
    }[layout.zero_mode]
    groups = layout.groups * (layout.scale_dtype.itemsize + extra)
    return rows * (layout.columns * layout.bits / 8 + groups)


class Bench:
    def __init__(
        self,
        device: torch.device,
        *,
        rounds: int = 25,
        chain: int = _CHAIN,
        rotated_bytes: int = _ROTATED_BYTES,
        read_bytes: int = _READ_BYTES,
    ) -> None:
        self._device, self._rounds = device, rounds
        self._chain, self._rotated_bytes = chain, rotated_bytes
        self._multiprocessors = multiprocessors(0)
        seconds = read_bandwidth(device, size=read_bytes, rounds=max(2, rounds // 2)).median
        self.read = read_bytes / seconds

    def measure(self, shape: Shape, format: Format) -> Iterator[dict[str, object]]:
        """Times with rows dealt out by index, and to the block that asks first."""
        layout = make_layout(
            format.bits, shape.columns, format.group_size, format.zero_mode, format.scale_dtype
        )
        size = bytes_of(layout, sum(shape.rows))
        count = self._count(size)
        sets = [self._matrices(layout, shape) for _ in range(min(4, count))]
        # random codes differ in nothing that matters for time: the others are copies
        packed = [[matrix.packed for matrix in matrices] for matrices in sets]
        packed += [
            [type(p)(p.rows.clone(), p.layout, p.count) for p in packed[i % len(sets)]]
            for i in range(len(sets), count)
        ]
        x, wanted = self._input(shape)
        out = torch.empty(sum(shape.rows), device=self._device)
        counters = torch.zeros(count, dtype=torch.int32, device=self._device)
        passes: dict[bool, Callable[[], object]] = {}
        for counted in (False, True):
            options = dict(
                x=x, dtype=torch.bfloat16, out=out, multiprocessors=self._multiprocessors
            )
            launches = [
                quantised.launch(
                    matrices,
                    [None] * len(matrices),
                    counter=counters[i : i + 1] if counted else None,
                    **options,
                )
                for i, matrices in enumerate(packed)
            ]
            counters.zero_()
            self._start(launches[:1])
            values = torch.cat([matrix.values for matrix in sets[0]])
            error = (out.double() - values @ wanted).abs()
            worst = (error / error_bound(values, wanted)).max().item()
            assert worst <= 1, f"{worst} of what rounding explains"
            passes[counted] = self._pass(launches, counters)
        del sets, values
        macros = quantised.macros(
            layout,
            dtype=torch.bfloat16,
            normed=shape.normed,
            most_rows=quantised.most_rows(layout, shape.rows, self._multiprocessors),
            shared_limit=shared_memory(0),
        )
        about = {
            "kernel": "quantised",
            "bits": format.bits,
            "group_size": format.group_size,
            "zero_mode": format.zero_mode.name.lower(),
            "scale_dtype": str(format.scale_dtype).removeprefix("torch."),
            "launches": count,
            "ring": "{CHUNKS} chunks of {ROWS_OF_CHUNK} rows, {EARLY_CHUNKS} early".format(
                **macros
            ),
        }
        for counted, timing in time_passes(
            passes, count, device=self._device, rounds=self._rounds
        ).items():
            yield self._line(shape, size, timing) | about | {"counter": counted}

    def measure_bfloat16(self, shape: Shape) -> dict[str, object]:
        """The same with ``linear.cu``."""
        size = 2.0 * sum(shape.rows) * shape.columns
        count = self._count(size)
        x, _ = self._input(shape)
        out = torch.empty(sum(shape.rows), device=self._device)
        launches = []
        for _ in range(count):
            weights = [
                torch.randn(rows, shape.columns, device=self._device, dtype=torch.bfloat16)
                for rows in shape.rows
            ]
            launches.append((weights, self._bfloat16_launch(weights, x, out)))
        run = self._pass([launch for _, launch in launches], None)
        timing = time_passes({0: run}, count, device=self._device, rounds=self._rounds)[0]
        return self._line(shape, size, timing) | {"kernel": "linear", "bits": 16, "launches": count}

    def _bfloat16_launch(self, weights: list[Tensor], x: Tensor | Residual, out: Tensor) -> Launch:
        return cuda.launch(
            weights, [None] * len(weights), x=x, out=out, multiprocessors=self._multiprocessors
        )

    def _count(self, size: float) -> int:
        return max(self._chain, -(-self._rotated_bytes // int(size)))

    def _matrices(self, layout: RowLayout, shape: Shape) -> list:
        return [make_matrix(layout, rows, device=self._device) for rows in shape.rows]

    def _input(self, shape: Shape) -> tuple[Tensor | Residual, Tensor]:
        """What a launch takes, and its value in float64."""
        x = torch.randn(shape.columns, device=self._device)
        if not shape.normed:
            self._kept = (x.bfloat16(),)
            return self._kept[0], self._kept[0].double()
        weight = torch.ones(shape.columns, device=self._device, dtype=torch.bfloat16)
        self._kept = x, weight  # launches hold only the addresses
        residual = Residual(base=address(x), weight=address(weight), epsilon=1e-5)
        return residual, x.double() * torch.rsqrt(x.double().square().mean() + 1e-5)

    def _pass(self, launches: list[Launch], counters: Tensor | None) -> Callable[[], object]:
        def run() -> None:
            if counters is not None:
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

    def _line(self, shape: Shape, size: float, timing: Timing) -> dict[str, object]:
        return {
            "shape": shape.name,
            "rows": sum(shape.rows),
            "columns": shape.columns,
            "normed": shape.normed,
            "us": timing.median * 1e6,
            "us_low": timing.low * 1e6,
            "us_high": timing.high * 1e6,
            "share": size / self.read / timing.median,
            "read_tb_per_s": self.read / 1e12,
            "megabytes": size / 1e6,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shapes", nargs="*", default=[shape.name for shape in SHAPES])
    parser.add_argument("--bits", nargs="*", type=int, default=[4, 8, 16])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--rows", type=int, help="of a chunk, instead of the kernel's choice")
    parser.add_argument("--chunks", type=int, help="of the ring")
    parser.add_argument("--early-bytes", type=int, help="on their way before the input is there")
    arguments = parser.parse_args()
    # private: only this script tries other sizes
    choose = quantised._ring
    if arguments.rows or arguments.chunks:
        quantised._ring = lambda layout, most, room: (
            arguments.rows or choose(layout, most, room)[0],
            arguments.chunks or choose(layout, most, room)[1],
        )
    if arguments.early_bytes:
        quantised._EARLY_BYTES = arguments.early_bytes
    bench = Bench(torch.device("cuda"), rounds=arguments.rounds)
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("a") as file:
        for line in _measure_all(bench, arguments.shapes, arguments.bits):
            print(json.dumps(line | about), file=file, flush=True)
            print({key: line.get(key) for key in _SHOWN}, flush=True)


_SHOWN = "shape", "bits", "group_size", "zero_mode", "counter", "us", "share", "ring"


def _measure_all(bench: Bench, names: list[str], bits: list[int]) -> Iterator[dict[str, object]]:
    for shape in SHAPES:
        if shape.name not in names:
            continue
        for format in FORMATS:
            if format.bits in bits:
                yield from bench.measure(shape, format)
        if 16 in bits:
            yield bench.measure_bfloat16(shape)


if __name__ == "__main__":
    main()
