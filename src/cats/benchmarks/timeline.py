"""``cats bench timeline``: where a layer of the stream engine spends its time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cats.apply import sparsify_
from cats.benchmarks.decode import copy_for_fusion
from cats.calibration import collect
from cats.decode.capture import capture, window_of
from cats.decode.forward import prefill
from cats.decode.state import State
from cats.errors import ConfigError
from cats.fusion import fuse_
from cats.results import EVENTS, LAUNCHES, Moment, environment

_TOKENS = 16

# Of a launch and event: the first, the median and the last warp.
_Moments = dict[tuple[str, str], tuple[float, float, float]]


def measure(
    model: nn.Module,
    blocks: Tensor,
    *,
    name: str,
    sparsities: Iterable[float],
    context: int,
    commit: str | None = None,
) -> Iterator[Moment]:
    """Trace some tokens of a dense model and of sparse copies of it.

    Args:
        model: A dense Hugging Face causal model on a GPU; its weights are laid out anew.
        blocks: Token ids ``[N, T]`` that thresholds are calibrated on; the first are the prompt.
        name: Of the model, for the results.
        sparsities: Targets of CATS; 0 is the dense model.
        context: Tokens in front of the first one that is traced.
        commit: Of the sources, where they are no checkout that could tell it.

    Yields:
        For each sparsity, launch and event its time in microseconds behind the end of the layer
        before: the median over warps, and the first and last of them, each as a mean over layers
        and tokens.

    Raises:
        BackendError: If the stream engine cannot run the model.
        ConfigError: If the model is not on a GPU or has one layer, or a context or sparsity is
            out of range.
    """
    device = next(model.parameters()).device
    sparsities = list(sparsities)
    if device.type != "cuda":
        raise ConfigError(f"a timeline is of kernels on a CUDA device, the model is on {device}")
    if not all(0 <= s < 1 for s in sparsities):
        raise ConfigError(f"sparsities must lie in [0, 1), got {sparsities}")
    whole: Any = model
    config = whole.config.get_text_config(decoder=True)
    if config.num_hidden_layers < 2:
        raise ConfigError("a layer is timed behind another one: expected at least 2 layers, got 1")
    most = min(config.max_position_embeddings - _TOKENS, blocks.shape[1])
    if not 1 <= context <= most:
        raise ConfigError(f"expected a context of 1 to {most} tokens, got {context}")
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    about = environment(str(device), commit=commit)
    counts = collect(model, blocks.to(device).split(4)) if any(sparsities) else None
    for sparsity in sparsities:
        traced = model
        if sparsity:
            assert counts is not None
            traced = copy_for_fusion(model)
            sparsify_(traced, counts.config(sparsity))
            fuse_(traced)
        found = _trace(traced, config, blocks[:1, :context].to(device))
        for (launch, event), (low, middle, high) in found.items():
            yield Moment(
                value=middle, low=low, high=high, samples=_TOKENS, environment=about, model=name,
                dtype=dtype, sparsity=sparsity, context=context, launch=launch, event=event,
            )  # fmt: skip


@torch.inference_mode()
def _trace(model: nn.Module, config: Any, prompt: Tensor) -> _Moments:
    # imported here: results can be read where there is no CUDA
    from cats.decode.stream.engine import StreamEngine

    engine = StreamEngine(model)
    # one token more in front is run, and not traced: the first replay loads code
    before = prompt.shape[1] - 1
    length = prompt.shape[1] + _TOKENS
    with torch.cuda.device(prompt.device):
        state = State(model, config, 1, length)
        prefill(model, state, prompt, 0)
        state.tokens.copy_(prompt[:, -1:])
        state.start_at(before)
        chain = engine.chain(state, traced=True)
        window = window_of(length, length)
        graph = capture(lambda: chain.run_greedily(window, 0), state)
        graph.replay()
        tokens: list[_Moments] = []
        for _ in range(_TOKENS):
            assert chain.stamps is not None
            chain.stamps.zero_()
            graph.replay()
            tokens.append(moments(chain.stamps.cpu()))
    return _mean(tokens)


def moments(stamps: Tensor) -> _Moments:
    """The first, median and last warp at each event, means over all layers but the first.

    Args:
        stamps: Of a token, ``[launches, blocks, warps, events]``, int64, nanoseconds; 0 where
            nothing was noted.
    """
    layers: list[_Moments] = []
    for first in range(1 + len(LAUNCHES), len(stamps) - 2, len(LAUNCHES)):
        begin = stamps[first - 1, ..., EVENTS.index("end")].max()
        found: _Moments = {}
        for launch, of_launch in zip(LAUNCHES, stamps[first:], strict=False):
            for event, times in zip(EVENTS, of_launch.flatten(0, 1).T, strict=True):
                behind = (times[times > 0] - begin).double() / 1e3
                if len(behind):
                    low, middle, high = behind.min(), behind.median(), behind.max()
                    found[launch, event] = float(low), float(middle), float(high)
        layers.append(found)
    return _mean(layers)


def _mean(found: list[_Moments]) -> _Moments:
    groups: defaultdict[tuple[str, str], list[tuple[float, float, float]]] = defaultdict(list)
    for each in found:
        for moment, times in each.items():
            groups[moment].append(times)
    means: _Moments = {}
    for moment, rows in groups.items():
        low, middle, high = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        means[moment] = low, middle, high
    return means
