"""Times of gated MLPs of several tokens: ``python -m tests.ops.mlp.time_rows --output PATH``.

A chain of launches in a CUDA graph, each of which may start while the one before drains, over
weights that no cache holds. Tokens are random, so their masks are about independent. For each shape
and sparsity a table of microseconds per launch, and of the share of the best read of this run at
which the gate rows and what the neurons need that some token keeps came: one line for each way to
cut and request rows (``SETTINGS``), one column for each number of tokens. Each result is a line of
JSON in the file. Outputs are checked before anything is timed. The line of ``gated_mlp`` is the
kernel of one token within the stream engine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cats.benchmarks.timing import read_bandwidth, time_passes
from cats.ops.cuda.arguments import address
from cats.ops.cuda.device import multiprocessors, shared_memory
from cats.ops.cuda.function import Launch
from cats.ops.cuda.residual import Residual
from cats.ops.cuda.rows_input import TOKENS, tokens_at_once
from cats.ops.mlp.cuda import residual, rows
from tests.ops.linear.time_rows import SETTINGS, Setting, compile_all, report

_CHAIN = 8
_READ_BYTES = 4 * 2**30
# (D, F)
SHAPES = {"mistral": (4096, 14336), "llama-1b": (2048, 8192), "llama-2": (4096, 11008)}
SPARSITIES = (0.0, 0.5, 0.7)


class Bench:
    def __init__(
        self,
        device: torch.device,
        *,
        rounds: int = 15,
        chain: int = _CHAIN,
        read_bytes: int = _READ_BYTES,
    ) -> None:
        self._device, self._rounds, self._chain = device, rounds, chain
        self._multiprocessors = multiprocessors(0)
        seconds = read_bandwidth(device, size=read_bytes, rounds=max(2, rounds // 2)).median
        self.read = read_bytes / seconds

    def measure(
        self,
        shape: tuple[int, int],
        tokens: Sequence[int],
        sparsity: float,
        settings: Sequence[Setting],
    ) -> Iterator[dict[str, object]]:
        """Times in each setting with each number of tokens, of which each drops a share."""
        hidden, neurons = shape
        mlps = [self._mlp(hidden, neurons) for _ in range(self._chain)]
        counters = torch.zeros(self._chain, 1024, dtype=torch.int32, device=self._device)
        sums = torch.zeros(max(tokens), hidden, device=self._device)
        inputs = torch.randn(max(tokens), hidden, device=self._device, dtype=torch.bfloat16)
        passes: dict[tuple[str, int], Callable[[], object]] = {}
        shares: dict[int, float] = {}
        threshold = self._threshold(mlps[0][0], inputs[:1], sparsity)
        thresholds = torch.full((neurons,), threshold, device=self._device)
        for setting in settings:
            for number in tokens:
                with setting.of(rows):
                    launches = self._launches(
                        mlps,
                        inputs[:number],
                        thresholds,
                        sums,
                        counters if setting.tickets else None,
                    )
                shares[number] = self._check(
                    mlps[0],
                    inputs[:number],
                    threshold,
                    launches[: len(launches) // self._chain],
                    sums,
                    counters,
                )
                passes[setting.name, number] = self._pass(launches, counters)
        x = inputs[0].float()
        norm = torch.ones(hidden, device=self._device, dtype=torch.bfloat16)
        stream = Residual(base=address(x), weight=address(norm), epsilon=1e-5)
        launches = [
            residual.launch(
                x=stream,
                **matrices_of(mlp),
                thresholds=thresholds,
                activation="silu",
                gate_bias=None,
                up_bias=None,
                sums=sums[0],
                counters=counter,
                multiprocessors=self._multiprocessors,
            )
            for mlp, counter in zip(mlps, counters, strict=True)
        ]
        passes["gated_mlp", 1] = self._pass(launches, counters)
        shares[1] = self._share_of(mlps[0], inputs[:1], threshold)
        timings = time_passes(passes, self._chain, device=self._device, rounds=self._rounds)
        for (kernel, number), timing in timings.items():
            union = shares[number]
            needed = 2.0 * neurons * hidden * (1 + 2 * union)
            yield {
                "kernel": kernel,
                "hidden": hidden,
                "neurons": neurons,
                "tokens": number,
                "sparsity": sparsity,
                "union": union,
                "us": timing.median * 1e6,
                "us_low": timing.low * 1e6,
                "us_high": timing.high * 1e6,
                "share": needed / self.read / timing.median,
                "read_tb_per_s": self.read / 1e12,
            }

    def _mlp(self, hidden: int, neurons: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up, and the columns of down."""
        shape = 3, neurons, hidden
        weights = torch.randn(shape, device=self._device, dtype=torch.bfloat16) / hidden**0.5
        return weights[0], weights[1], weights[2]

    def _launches(
        self,
        mlps: list[tuple[Tensor, Tensor, Tensor]],
        x: Tensor,
        thresholds: Tensor,
        sums: Tensor,
        counters: Tensor | None,
    ) -> list[Launch]:
        return [
            launch
            for mlp, counter in zip(
                mlps, [None] * len(mlps) if counters is None else counters, strict=True
            )
            for launch in rows.launches(
                x=x,
                **matrices_of(mlp),
                thresholds=thresholds,
                activation="silu",
                gate_bias=None,
                up_bias=None,
                active=None,
                sums=sums[: len(x)],
                counters=counter,
                multiprocessors=self._multiprocessors,
            )
        ]

    def _threshold(self, gate: Tensor, x: Tensor, sparsity: float) -> float:
        if not sparsity:
            return 0.0
        values = self._gates(gate, x).abs().flatten().sort().values
        return float(values[int(sparsity * len(values))])

    def _gates(self, gate: Tensor, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(x.float() @ gate.float().t())

    def _share_of(self, mlp: tuple[Tensor, Tensor, Tensor], x: Tensor, threshold: float) -> float:
        return (self._gates(mlp[0], x).abs() >= threshold).any(0).float().mean().item()

    def _check(
        self,
        mlp: tuple[Tensor, Tensor, Tensor],
        x: Tensor,
        threshold: float,
        launches: list[Launch],
        sums: Tensor,
        counters: Tensor,
    ) -> float:
        """Compare one MLP with torch; returns the share of neurons that some token keeps."""
        sums.zero_()
        counters.zero_()
        self._start(launches)
        gates = self._gates(mlp[0], x)
        products = gates.where(gates.abs() >= threshold, 0) * (x.float() @ mlp[1].float().t())
        expected = products @ mlp[2].float()
        error = ((sums[: len(x)] - expected).norm() / expected.norm()).item()
        # where sums differ in their order, a neuron may fall on the other side of its threshold
        limit = 1e-2 if threshold else 1e-4
        assert error < limit, f"{len(x)} tokens, threshold {threshold:.3}: error {error:.1e}"
        return self._share_of(mlp, x, threshold)

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


def matrices_of(mlp: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(gate=mlp[0], up=mlp[1], down=mlp[2].t())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--sparsities", nargs="*", type=float, default=list(SPARSITIES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--settings", nargs="*", type=int, help="lines of SETTINGS, 0 the first")
    options = parser.parse_args()
    settings = SETTINGS if options.settings is None else [SETTINGS[i] for i in options.settings]
    torch.backends.cuda.matmul.allow_tf32 = False
    compile_all("mlp/cuda/mlp_rows.cu", _macros(options.shapes, options.tokens, settings))
    bench = Bench(torch.device("cuda"), rounds=options.rounds)
    for name in options.shapes:
        for sparsity in options.sparsities:
            lines = bench.measure(SHAPES[name], options.tokens, sparsity, settings)
            title = f"{name}, sparsity {sparsity}"
            report(options.output, title, lines, column="tokens", row="kernel")


def _macros(
    shapes: Sequence[str], tokens: Sequence[int], settings: Sequence[Setting]
) -> Iterator[dict[str, int]]:
    for setting in settings:
        with setting.of(rows):
            for hidden, neurons in (SHAPES[name] for name in shapes):
                for number in tokens:
                    yield rows.macros(
                        hidden,
                        torch.bfloat16,
                        tokens_at_once(hidden, torch.bfloat16, number),
                        activation="silu",
                        neurons=neurons,
                        multiprocessors=multiprocessors(0),
                        shared_limit=shared_memory(0),
                    )


if __name__ == "__main__":
    main()
