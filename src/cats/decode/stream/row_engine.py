"""Steps of several rows by kernels that read each weight once for all of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar
from weakref import ref

import torch
from torch import Tensor, nn

from cats.decode.capture import must_be_deterministic, window_of
from cats.decode.rows.cache import RowCache
from cats.decode.rows.check import difference_from_single_rows
from cats.decode.rows.choice import choose_tokens
from cats.decode.rows.modules import ModuleRows
from cats.decode.rows.row import Row
from cats.decode.runner import largest_difference
from cats.decode.state import State
from cats.decode.stream.layout import lay_out_down
from cats.decode.stream.probe import embedding_scale
from cats.decode.stream.rotary import RotaryTables
from cats.decode.stream.row_buffers import RowBuffers, split_places
from cats.decode.stream.rows import RowChain
from cats.decode.stream.spec import read_spec, with_plain_embedding
from cats.errors import UnsupportedModelError
from cats.ops.cuda.device import multiprocessors
from cats.ops.cuda.rows_input import TOKENS

T = TypeVar("T")


class StreamRows(ModuleRows):
    """Rows of any lengths: prompts by the model's modules, steps by the kernels of 16-bit weights.

    ``down`` of each MLP is stored column by column, in place.
    """

    def __init__(self, model: nn.Module, lines: int, capacity: int, *, rows: int) -> None:
        """
        Args:
            model: On a GPU; compared with the kernels here.
            lines: Lines of the cache.
            capacity: Slots of each.
            rows: How many rows a step may have, up to 16.

        Raises:
            UnsupportedModelError: If the kernels do not take the model, or differ from it.
        """
        if rows > TOKENS[-1]:
            raise UnsupportedModelError(f"kernels take up to {TOKENS[-1]} rows, got {rows}")
        super().__init__(model, lines, capacity)
        self._steps: KernelSteps | None = None
        with torch.inference_mode():
            steps = KernelSteps(model, self.cache, self._tokens, self._single, rows)
            # which run prompts, and all steps while algorithms must be deterministic
            self._check(self.logits, min(3, lines), "modules")
            for size in steps.sizes:
                self._check(steps.logits, min(size, rows, lines), "kernels")
        self._steps = steps

    def step(self, rows: Sequence[Row]) -> Tensor:
        # the kernels add up in any order
        if self._steps is None or must_be_deterministic():
            return super().step(rows)
        lines, positions = [row.line.index for row in rows], [row.position for row in rows]
        if all(row.choice.is_plain for row in rows):
            return self._steps.choose(lines, positions)
        logits = self._steps.run(lines, positions)
        tokens = choose_tokens(logits, [row.choice for row in rows])
        self._tokens[torch.tensor(lines, device=self.device)] = tokens.clamp(min=0)
        return tokens

    def _check(self, step: Callable[..., Tensor], count: int, runs: str) -> None:
        difference = difference_from_single_rows(self, step, count)
        if not difference <= largest_difference(self.model):
            raise UnsupportedModelError(
                f"a step of {count} rows by {runs} differs from the model by {difference:.1%}"
            )

    def forget(self) -> None:
        """The model is no longer the one that was read: from now on, steps run its modules."""
        super().forget()
        self._steps = None


class KernelSteps:
    """Steps of rows in CUDA graphs, one for each number of rows and window of the cache.

    Attributes:
        sizes: The numbers of rows that there are kernels for, in order.
    """

    def __init__(
        self, model: nn.Module, cache: RowCache, tokens: Tensor, state: State, rows: int
    ) -> None:
        """
        Args:
            model: On a GPU.
            cache: Keys and values of all lines.
            tokens: The newest token of each line, int64.
            state: A conversation of one row, of which nothing is kept.
            rows: How many rows a step may have.

        Raises:
            UnsupportedModelError: If the kernels do not take the model.
        """
        spec, laid_out = with_plain_embedding(read_spec(model)), list[ref[nn.Parameter]]()
        # the weights must not become tensors of inference mode
        with torch.inference_mode(False), torch.no_grad():
            lay_out_down(spec, laid_out)
        # graphs read these weights, so they stay in memory even if the model gets new ones
        spec = spec.detached()
        self._device, self._capacity, self._tokens = tokens.device, cache.capacity, tokens
        self.sizes = [size for size in TOKENS if size < 2 * rows]
        count = multiprocessors(int(self._device.index or 0))
        scale = embedding_scale(model, spec, state, torch.zeros_like(tokens[:1, None]))
        self._buffers = RowBuffers.of(
            spec, self.sizes[-1], tokens, capacity=cache.capacity, multiprocessors=count
        )
        rotary = RotaryTables(spec, cache.capacity)
        self._chains = {
            size: RowChain(
                spec,
                self._buffers,
                cache.buffers(),
                rotary,
                size,
                embedding_scale=scale,
                multiprocessors=count,
            )
            for size in self.sizes
        }
        self._runs: dict[tuple[int, int], Callable[[], Tensor]] = {}
        self._choices: dict[tuple[int, int], Callable[[], None]] = {}
        self._step = self._uploads = 0
        # the host may be some steps ahead of what the device has read
        pinned = self._device.type == "cuda"
        places = self._buffers.places
        self._staging = [
            torch.zeros(places.shape, dtype=places.dtype, pin_memory=pinned)
            for _ in self._buffers.chosen
        ]
        self._there: tuple[list[int], list[int], int] | None = None

    def choose(self, lines: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Run the newest token of each row, and take the likeliest next one.

        Args:
            lines: The line of each row.
            positions: Position and slot of its newest token.

        Returns:
            The choices, ``[R]``, int64, which stay for some steps.
        """
        size, window = self._place(lines, positions), self._window(positions)
        key, chain = (size, window), self._chains[size]
        if key not in self._choices:
            self._choices[key] = captured(lambda: chain.run_greedily(window), self._device)
        chosen = self._buffers.chosen[self._step % len(self._buffers.chosen)]
        self._choices[key]()
        self._step += 1
        self._there = list(lines), [position + 1 for position in positions], size
        return chosen[: len(lines)]

    def run(self, lines: Sequence[int], positions: Sequence[int]) -> Tensor:
        """The same without a choice: logits ``[R, V]``, until the next step."""
        size, window = self._place(lines, positions), self._window(positions)
        key, chain = (size, window), self._chains[size]
        if key not in self._runs:
            self._runs[key] = captured(lambda: chain.run(window), self._device)
        return self._runs[key]()[: len(lines)]

    def logits(
        self, lines: Sequence[int], positions: Sequence[int], tokens: Tensor, window: int
    ) -> Tensor:
        """As :meth:`ModuleRows.logits`; the tokens become the newest ones of their lines."""
        self._tokens[torch.tensor(lines, device=self._device)] = tokens
        return self.run(lines, positions)

    def _window(self, positions: Sequence[int]) -> int:
        return window_of(max(positions) + 1, self._capacity)

    def _place(self, lines: Sequence[int], positions: Sequence[int]) -> int:
        """Tell the device which rows a step has; returns for how many the kernels are."""
        count = len(lines)
        size = next(size for size in self.sizes if size >= count)
        wanted = list(lines), list(positions), size
        if wanted != self._there:
            staging = self._staging[self._uploads % len(self._staging)]
            self._uploads += 1
            places = split_places(staging, self.sizes[-1])
            staging.zero_()
            for place, values in zip(places, (lines, positions, [1] * count), strict=True):
                place[:count] = torch.tensor(values)
            self._buffers.places.copy_(staging, non_blocking=True)
            self._there = wanted
        return size


def captured(step: Callable[[], T], device: torch.device) -> Callable[[], T]:
    """Replays a step from a CUDA graph of it, and returns what the step returned."""
    graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        try:
            # other threads may use the GPU meanwhile
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                # a collection could destroy another graph, which a capture does not allow
                gc.disable()
                result = step()
        finally:
            if collects:
                gc.enable()

    def replay() -> T:
        # a graph runs on the current device, which may be another one than the model's
        with torch.cuda.device(device):
            graph.replay()
        return result

    return replay
