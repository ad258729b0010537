"""Times of linear layers of several tokens: ``python -m tests.ops.linear.time_rows --output PATH``.

A chain of launches in a CUDA graph, each of which may start while the one before drains, over
weights that no cache holds. For each shape a table of microseconds per launch, and of the share of
the best read of this run at which the bytes of the weights came: one line for each way to cut and
request rows (``SETTINGS``), one column for each number of tokens. Each result is a line of JSON in
the file. Outputs are checked before anything is timed. The line of ``linear`` is the kernel of one
token, without a norm.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from cats.benchmarks.timing import read_bandwidth, time_passes
from cats.ops.cuda import rows_input
from cats.ops.cuda.compiler import compile_kernel
from cats.ops.cuda.device import multiprocessors, shared_memory
from cats.ops.cuda.function import Launch
from cats.ops.cuda.rows_input import TOKENS, tokens_at_once
from cats.ops.linear import cuda, rows

_CHAIN = 24
_ROTATED_BYTES = 800 * 2**20
_READ_BYTES = 4 * 2**30
_KB = 1024


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


@dataclass(frozen=True)
class Setting:
    """How a kernel of rows may cut and request them.

    Attributes:
        name: In the table.
        tickets: Whether some runs go to the block that asks first.
        sizes: Other values of those constants that the kernel's module or ``rows_input`` has.
    """

    name: str
    tickets: bool = False
    sizes: dict[str, int | bool] = field(default_factory=dict)

    @contextmanager
    def of(self, module: ModuleType) -> Iterator[None]:
        """Within the block, launches of ``module`` are made so."""
        # private: only scripts that measure try other sizes
        owners = {n: o for n in self.sizes for o in (module, rows_input) if hasattr(o, n)}
        before = {name: getattr(owner, name) for name, owner in owners.items()}
        for name, owner in owners.items():
            setattr(owner, name, self.sizes[name])
        module._function.cache_clear()
        try:
            yield
        finally:
            for name, owner in owners.items():
                setattr(owner, name, before[name])
            module._function.cache_clear()


def _ring(size: int) -> dict[str, int | bool]:
    return dict(_RING_BYTES=size * _KB, _RING_BYTES_ALONE=size * _KB)


_EARLY = dict(_EARLY_BYTES=68 * _KB)
_NEXT = dict(_NEXT_EARLY=True)
SETTINGS = [
    Setting("tickets, as it is", tickets=True),
    Setting("by index"),
    Setting("index, early 68K", sizes=_EARLY),
    Setting("index, early 68K, next early", sizes=_EARLY | _NEXT),
    Setting("index, early 68K, ring 140K", sizes=_EARLY | _ring(140)),
    Setting("index, early 68K, ring 204K", sizes=_EARLY | _ring(204)),
    Setting("index, early 68K, ring 204K, next", sizes=_EARLY | _NEXT | _ring(204)),
    Setting(
        "index, parts 8K, ring 204K, next",
        sizes=dict(_PART_BYTES=8192, _PASS_OUTPUTS=2048) | _NEXT | _ring(204),
    ),
    Setting(
        "index, parts 2K, ring 104K, next",
        sizes=dict(_PART_BYTES=2048, _PASS_OUTPUTS=512) | _NEXT | _ring(104),
    ),
]


def compile_all(source: str, all_macros: Iterable[dict[str, int]]) -> None:
    """Compile kernels beside each other, so that they come from the cache on disk afterwards."""
    capability = torch.cuda.get_device_capability()
    different = {tuple(sorted(macros.items())): macros for macros in all_macros}
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda m: compile_kernel(source, m, capability), different.values()))


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

    def measure(
        self, shape: Shape, tokens: Sequence[int], settings: Sequence[Setting]
    ) -> Iterator[dict[str, object]]:
        """Times in each setting with each number of tokens; then those of one token's kernel."""
        size = 2.0 * sum(shape.rows) * shape.columns
        count = max(2, min(self._chain, -(-self._rotated_bytes // int(size))))
        weights = [
            [self._random(n, shape.columns, scale=shape.columns**-0.5) for n in shape.rows]
            for _ in range(count)
        ]
        inputs = self._random(max(tokens), shape.columns)
        expected = inputs.float() @ torch.cat(weights[0]).float().t()
        counters = torch.zeros(count, 2, dtype=torch.int32, device=self._device)
        out = torch.empty(max(tokens), sum(shape.rows), device=self._device)
        passes: dict[tuple[str, int], Callable[[], object]] = {}
        for setting in settings:
            for number in tokens:
                with setting.of(rows):
                    launches = [
                        launch
                        for matrices, counter in zip(weights, counters, strict=True)
                        for launch in rows.launches(
                            matrices,
                            [None] * len(matrices),
                            x=inputs[:number],
                            out=out[:number],
                            counters=counter if setting.tickets else None,
                            multiprocessors=self._multiprocessors,
                        )
                    ]
                out.fill_(torch.nan)
                counters.zero_()
                self._start(launches[: len(launches) // count])
                difference = out[:number] - expected[:number]
                error = (difference.norm() / expected[:number].norm()).item()
                assert error < 1e-4, f"{setting.name}, {number} tokens: error {error:.1e}"
                passes[setting.name, number] = self._pass(launches, counters)
        launches = [
            cuda.launch(
                matrices,
                [None] * 3,
                x=inputs[0],
                out=out[0],
                multiprocessors=self._multiprocessors,
            )
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
    parser.add_argument("--settings", nargs="*", type=int, help="lines of SETTINGS, 0 the first")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    settings = SETTINGS if options.settings is None else [SETTINGS[i] for i in options.settings]
    shapes = [shape for shape in SHAPES if shape.name in options.shapes]
    compile_all("linear/linear_rows.cu", _macros(shapes, options.tokens, settings))
    bench = Bench(torch.device("cuda"), rounds=options.rounds)
    for shape in shapes:
        report(
            options.output,
            shape.name,
            bench.measure(shape, options.tokens, settings),
            column="tokens",
            row="kernel",
        )


def _macros(
    shapes: Sequence[Shape], tokens: Sequence[int], settings: Sequence[Setting]
) -> Iterator[dict[str, int]]:
    for setting in settings:
        with setting.of(rows):
            for columns in {shape.columns for shape in shapes}:
                for number in tokens:
                    at_once = tokens_at_once(columns, torch.bfloat16, number)
                    yield rows.macros(
                        columns, torch.bfloat16, at_once, shared_limit=shared_memory(0)
                    )


def report(
    output: Path, title: str, lines: Iterable[dict[str, object]], *, column: str, row: str
) -> None:
    """Append results to a file, and print a table of microseconds and shares."""
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    table: dict[object, dict[object, str]] = {}
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a") as file:
        for line in lines:
            print(json.dumps(line | about), file=file, flush=True)
            cell = f"{line['us']:7.2f} {line['share']:4.2f}"
            table.setdefault(line[row], {})[line[column]] = cell
    names = list(dict.fromkeys(name for cells in table.values() for name in cells))
    print(f"\n{title:36}", *(f"{name!s:>12}" for name in names))
    for name, cells in table.items():
        print(f"{name!s:36}", *(cells.get(key, "").rjust(12) for key in names), flush=True)


if __name__ == "__main__":
    main()
