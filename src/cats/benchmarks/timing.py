"""Time calls fairly on a GPU or a CPU, and measure how fast memory can be read there."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, TypeVar

import torch

from cats import ops

Key = TypeVar("Key", bound=Hashable)
# Calls in one GPU graph or CPU pass, so that the cost of starting it disappears.
MIN_CALLS = 32
# As large as the last-level cache of a desktop or a rented core's share of a server.
_UNKNOWN_CACHE = 64 * 2**20


class Quartiles(TypedDict):
    """The fields that every result has of a timing, in the unit of the result."""

    value: float
    low: float
    high: float
    samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Median and quartiles of some samples, in seconds or in the unit of a result."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median=median, low=low, high=high, samples=len(samples))

    @classmethod
    def once(cls, value: float) -> "Timing":
        """Of something that was measured once."""
        return cls(median=value, low=value, high=value, samples=1)

    @property
    def quartiles(self) -> Quartiles:
        return {"value": self.median, "low": self.low, "high": self.high, "samples": self.samples}

    def scaled(self, factor: float) -> "Timing":
        return self._map(lambda value: value * factor)

    def less(self, seconds: float) -> "Timing":
        """What is left without something else that was timed with it."""
        return self._map(lambda value: value - seconds)

    def as_rate(self, amount: float) -> "Timing":
        """The amount per second, if one sample is the time of the whole amount."""
        return Timing(
            median=amount / self.median,
            low=amount / self.high,
            high=amount / self.low,
            samples=self.samples,
        )

    def _map(self, change: Callable[[float], float]) -> "Timing":
        return Timing(
            median=change(self.median),
            low=change(self.low),
            high=change(self.high),
            samples=self.samples,
        )


def time_passes(
    passes: Mapping[Key, Callable[[], object]],
    calls: int,
    *,
    device: torch.device,
    rounds: int,
) -> dict[Key, Timing]:
    """Time several passes of ``calls`` calls each, in turns, so that all meet the same machine.

    On a GPU a pass is captured in a CUDA graph and its replays are timed with events.
    """
    if device.type == "cuda":
        timers = {name: _graph_timer(run) for name, run in passes.items()}
    else:
        timers = {name: _wall_timer(run) for name, run in passes.items()}
    for timer in timers.values():
        timer()
    seconds: dict[Key, list[float]] = {name: [] for name in passes}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name].append(timer() / calls)
    return {name: Timing.of(samples) for name, samples in seconds.items()}


def read_bandwidth(device: torch.device, *, size: int, rounds: int) -> Timing:
    """Seconds to read ``size`` bytes, far more than any cache holds, in the fastest of some ways.

    One way is a sum over the buffer. Another is its product with a vector, since arithmetic may
    bound a sum on a CPU. Where it is live, the third is our own CUDA kernel with every neuron kept,
    which streams the buffer through bulk copies.
    """
    columns = 4096
    rows = max(1, size // (4 * columns))
    buffer = torch.ones(rows, columns, device=device)
    vector = torch.ones(columns, device=device)
    passes: dict[str, Callable[[], object]] = {
        "sum": lambda: buffer.sum(),
        "product": lambda: buffer @ vector,
    }
    read = dict.fromkeys(passes, buffer.nbytes)
    if device.type == "cuda" and ops.backends()["cuda"] == "live":
        passes["kernel"], read["kernel"] = _kernel_read(buffer)
    timings = time_passes(passes, 1, device=device, rounds=rounds)
    fastest = min(timings, key=lambda name: timings[name].median / read[name])
    return timings[fastest].scaled(size / read[fastest])


def _kernel_read(buffer: torch.Tensor) -> tuple[Callable[[], object], int]:
    """One call of the operator over nearly all of the buffer, and how many bytes that is."""
    rows = buffer.view(torch.bfloat16)
    neurons, hidden = len(rows) // 3, rows.shape[1]
    gate, up, down = (rows[i * neurons : (i + 1) * neurons] for i in range(3))
    # the gates are positive: what is exactly zero would not be read on
    x = torch.full((1, hidden), 1 / hidden, dtype=torch.bfloat16, device=buffer.device)
    thresholds = torch.zeros(neurons, device=buffer.device)

    def read() -> object:
        return ops.gated_mlp(x, gate, up, down.t(), thresholds, "silu", backend="cuda")

    return read, 3 * neurons * hidden * rows.element_size()


def cache_size(device: torch.device) -> int:
    """Bytes of the last-level cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text(encoding="utf-8")
        return int(text.strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return _UNKNOWN_CACHE


def _graph_timer(run: Callable[[], object]) -> Callable[[], float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def timer() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    return timer


def _wall_timer(run: Callable[[], object]) -> Callable[[], float]:
    def timer() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return timer
