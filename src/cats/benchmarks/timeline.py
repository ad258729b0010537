"""``cats bench timeline``: where a layer of the stream engine spends its time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from cats.apply import sparsify_
from cats.benchmarks.copies import copy_for_fusion
from cats.calibration import collect
from cats.decode.capture import capture, window_of
from cats.decode.forward import prefill
from cats.decode.state import State
from cats.errors import ConfigError
from cats.fusion import fuse_
from cats.protocols import CausalModel, ModelConfig
from cats.results import EVENTS, LAUNCHES, Moment, environment

# Tokens that are traced.
_TOKENS = 16

# Launch and event to the times of the first, the median and the last warp.
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
        model: A dense Hugging Face causal model on a GPU. The layout of its weights is changed.
        blocks: Token ids ``[N, T]``. Thresholds are calibrated on them; the first are the prompt.
        name: Name of the model in the results.
        sparsities: Targets of CATS; 0 is the dense model.
        context: Tokens before the first one that is traced.
        commit: Commit of the sources, where they are not a checkout.

    Yields:
        For each sparsity, launch and event its time in microseconds after the end of the layer
        before. It is that of the median warp, with the first and the last one, each as a mean over
        layers and tokens.

    Raises:
        BackendError: If the stream engine cannot run the model.
        ConfigError: If the model is not on a GPU, if it has one layer only, or if the context or a
            sparsity is out of range.
    """
    device = next(model.parameters()).device
    sparsities = list(sparsities)
    if device.type != "cuda":
        raise ConfigError(f"a timeline needs a model on a CUDA device, this one is on {device}")
    if not all(0 <= s < 1 for s in sparsities):
        raise ConfigError(f"sparsities must lie in [0, 1), got {sparsities}")
    config = cast(CausalModel, model).config.get_text_config(decoder=True)
    if config.num_hidden_layers < 2:
        raise ConfigError("a layer is timed after another one: expected at least 2 layers, got 1")
    longest = min(config.max_position_embeddings - _TOKENS, blocks.shape[1])
    if not 1 <= context <= longest:
        raise ConfigError(f"expected a context of 1 to {longest} tokens, got {context}")
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    measured_on = environment(str(device), commit=commit)
    counts = collect(model, blocks.to(device).split(4)) if any(sparsities) else None
    for sparsity in sparsities:
        traced = model
        if sparsity:
            assert counts is not None
            traced = copy_for_fusion(model)
            sparsify_(traced, counts.config(sparsity))
            fuse_(traced)
        times = _trace(traced, config, blocks[:1, :context].to(device))
        for (launch, event), (low, median, high) in times.items():
            yield Moment(
                value=median,
                low=low,
                high=high,
                samples=_TOKENS,
                environment=measured_on,
                model=name,
                dtype=dtype,
                sparsity=sparsity,
                context=context,
                launch=launch,
                event=event,
            )


@torch.inference_mode()
def _trace(model: nn.Module, config: ModelConfig, prompt: Tensor) -> _Moments:
    # imported here: results can be read where there is no CUDA
    from cats.decode.stream.engine import StreamEngine

    engine = StreamEngine(model)
    # one more token runs before those that are traced: the first replay loads code
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
        stamps: Those of one token, ``[launches, blocks, warps, events]``, int64, nanoseconds; 0
            where no event was noted.
    """
    layers: list[_Moments] = []
    for first in range(1 + len(LAUNCHES), len(stamps) - 2, len(LAUNCHES)):
        begin = stamps[first - 1, ..., EVENTS.index("end")].max()
        layer: _Moments = {}
        for launch, launch_stamps in zip(LAUNCHES, stamps[first:], strict=False):
            for event, times in zip(EVENTS, launch_stamps.flatten(0, 1).T, strict=True):
                after = (times[times > 0] - begin).double() / 1e3
                if len(after):
                    low, median, high = after.min(), after.median(), after.max()
                    layer[launch, event] = float(low), float(median), float(high)
        layers.append(layer)
    return _mean(layers)


def _mean(samples: list[_Moments]) -> _Moments:
    groups: defaultdict[tuple[str, str], list[tuple[float, float, float]]] = defaultdict(list)
    for sample in samples:
        for moment, times in sample.items():
            groups[moment].append(times)
    means: _Moments = {}
    for moment, rows in groups.items():
        low, median, high = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        means[moment] = low, median, high
    return means
