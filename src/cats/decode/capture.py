"""Steps in CUDA graphs: one for each window of the cache, however many slots of it are in use."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from dataclasses import replace

import torch

from cats.decode.options import Options
from cats.decode.state import State
from cats.errors import BackendError

# Slots that a masked step reads: the smallest of these, doubled as often as needed.
_SMALLEST_WINDOW = 256


def window_of(length: int, capacity: int | None = None) -> int:
    """Slots that a masked step reads for rows of ``length`` tokens."""
    window = _SMALLEST_WINDOW
    while window < length:
        window *= 2
    return window if capacity is None else min(window, capacity)


def windows_of(state: State, lengths: range) -> list[int]:
    """The windows of the steps at these lengths, in order."""
    return sorted({window_of(length, state.capacity) for length in lengths})


def must_be_deterministic() -> bool:
    """Whether ``torch.use_deterministic_algorithms`` forbids sums in any order."""
    return (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )


def graph_key(engine: str, window: int, options: Options) -> Hashable:
    """What a captured step depends on: not the seed, nor the options that only the host reads."""
    of_the_step = replace(
        options,
        seed=None,
        max_new_tokens=1,
        stop_strings=(),
        num_return_sequences=1,
        max_time=None,
        stopping_criteria=(),
    )
    return engine, window, of_the_step


def capture(step: Callable[[], None], state: State) -> torch.cuda.CUDAGraph:
    """A CUDA graph of a step.

    Args:
        step: Runs the newest tokens and chooses the next ones.
        state: The conversation whose buffers it reads and writes.

    Raises:
        BackendError: If the GPU's memory does not suffice.
    """
    try:
        with torch.cuda.device(state.device):
            return _capture(step, state)
    except torch.cuda.OutOfMemoryError as error:
        state.captured.clear()
        raise BackendError(
            "out of memory while a step was captured: use a shorter context, a smaller batch, or "
            "engine='eager'"
        ) from error


def _capture(step: Callable[[], None], state: State) -> torch.cuda.CUDAGraph:
    before = [t.clone() for t in state.moving()]
    draws = state.generator.get_state()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # libraries allocate their workspaces in the first run, which a capture does not allow
        step()
    torch.cuda.current_stream().wait_stream(stream)
    for tensor, old in zip(state.moving(), before, strict=True):
        tensor.copy_(old)
    state.generator.set_state(draws)
    graph = torch.cuda.CUDAGraph()
    collects = gc.isenabled()
    if state.noise is not None:
        # replays then set the seed first, which takes time that greedy steps need not spend
        graph.register_generator_state(state.generator)
    # without a stream, torch captures on one of the first capture's GPU, even for another GPU
    try:
        with torch.cuda.graph(graph, stream=stream):
            # a collection could destroy another graph, which a capture does not allow
            gc.disable()
            step()
    finally:
        if collects:
            gc.enable()
    return graph


def replay(state: State, key: Hashable) -> None:
    """Run a captured step."""
    graph = state.captured[key]
    assert isinstance(graph, torch.cuda.CUDAGraph)
    # a graph runs on the current device, which may be another one than the model's
    with torch.cuda.device(state.device):
        graph.replay()
