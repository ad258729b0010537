"""Shows that the kernels compute what the layers of a model compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cats.decode.forward import prefill
from cats.decode.state import State
from cats.decode.stream.chain import Chain
from cats.decode.stream.spec import ModelSpec
from cats.errors import UnsupportedModelError

# Largest error of a layer, as a share of what it adds to the residual stream; the median of _INPUTS
# is compared. In 16 bits a rounding can move a neuron over its threshold, which changes much for
# one input where neurons are few, and little for all where they are many. A wrong formula gives
# errors near 1 for all.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
_INPUTS = 5
# Of the residual stream itself, which a model keeps in its own dtype.
_ROUNDING = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Of the logits: the model rounds after every layer, the kernels do not.
_LOGITS_TOLERANCE = {torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 0.15}
# Small, so that what a layer adds is not small beside it.
_INPUT_SCALE = 0.1
_SHORT = (1, 2, 37, 200, 300)  # in one turn, in several, and split over several blocks
# Keys and values of the longest context that is tried, at most.
_MOST_BYTES = 256 * 2**20


def probe(model: nn.Module, spec: ModelSpec) -> float:
    """Compare every layer with the model's own, at several lengths; then a whole token.

    Returns:
        What the model multiplies its embedding with.

    Raises:
        UnsupportedModelError: If something differs; the message says what.
    """
    whole: Any = model
    config = whole.config.get_text_config(decoder=True)
    lengths = _lengths(spec, config)
    with torch.inference_mode():
        state = State(model, config, 1, lengths[-1] + 1)
        ids = torch.zeros(1, 1, dtype=torch.int64, device=state.device)
        prefill(model, state, ids, 0)  # allocates keys and values
        for stored in state.cache.buffers():
            stored.normal_()
        chain = Chain(spec, state)
        for length in lengths:
            _probe_layers(model, spec, state, chain, length)
        ids += 1
        scale = _embedding_scale(model, spec, state, ids)
        state.tokens.copy_(ids)
        wanted = prefill(model, state, ids, lengths[0]).float()[0]
        state.start_at(lengths[0])
        whole_token = Chain(spec, state, scale)
        whole_token.use_frequencies_of(lengths[0] + 1)
        found = whole_token.run(lengths[0] + 1)
        error = float((found - wanted).norm() / wanted.norm())
        if not error <= _LOGITS_TOLERANCE[spec.dtype]:
            raise UnsupportedModelError(f"its logits differ from the kernels' by {error:.1%}")
    return scale


def _lengths(spec: ModelSpec, config: Any) -> list[int]:
    """Numbers of tokens in front of the probed one, in order."""
    slot = 2 * spec.key_heads * spec.head_size * spec.dtype.itemsize * len(spec.layers)
    most = min(_MOST_BYTES // slot, getattr(config, "max_position_embeddings", None) or 2**62) - 2
    parameters = getattr(config, "rope_parameters", None) or {}
    # not from the specification, which is what is in doubt
    spans = (
        getattr(config, "sliding_window", None),
        parameters.get("original_max_position_embeddings"),
    )
    beyond = [int(span) + 3 for span in spans if span]
    return sorted({length for length in (*_SHORT, *beyond) if length <= most})


def _probe_layers(
    model: nn.Module, spec: ModelSpec, state: State, chain: Chain, length: int
) -> None:
    """Each layer on inputs of its own, behind ``length`` other tokens."""
    chain.use_frequencies_of(length + 1)
    dtype, ids = spec.dtype, torch.zeros(1, 1, dtype=torch.int64, device=state.device)
    state.start_at(length)
    errors, sizes = [], []
    for _ in range(_INPUTS):
        inputs = torch.randn(len(spec.layers), spec.hidden_size, device=state.device)
        inputs = (_INPUT_SCALE * inputs).to(dtype)
        with _replaced(spec, inputs) as outputs:
            prefill(model, state, ids, length)
        for index, (given, output) in enumerate(zip(inputs, outputs, strict=True)):
            x, wanted = given.float(), output.float().view(-1)
            error = (chain.run_layer(index, x, length + 1) - wanted).norm()
            errors.append(error - _ROUNDING[dtype] * x.norm())
            sizes.append((wanted - x).norm())
    shares = torch.stack(errors) / torch.stack(sizes)
    for index, share in enumerate(shares.view(_INPUTS, -1).cpu().median(0).values.tolist()):
        if not share <= _TOLERANCE[dtype]:
            raise UnsupportedModelError(
                f"layer {index} differs from its kernels by {share:.1%} behind {length} tokens"
            )


@contextmanager
def _replaced(spec: ModelSpec, inputs: Tensor) -> Iterator[list[Tensor]]:
    """Each layer gets an input of its own; yields the list that its outputs go to."""
    outputs: list[Tensor] = []

    def give(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            x = inputs[index][None, None]
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        return hook

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    base: Any = spec.base
    handles = [
        handle
        for index, layer in enumerate(base.layers)
        for handle in (
            layer.register_forward_pre_hook(give(index), with_kwargs=True),
            layer.register_forward_hook(keep),
        )
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _embedding_scale(model: nn.Module, spec: ModelSpec, state: State, ids: Tensor) -> float:
    base: Any = spec.base
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = base.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        prefill(model, state, ids, 0)
    finally:
        handle.remove()
    embedded, found = spec.embedding[int(ids)].float(), seen[0].float().view(-1)
    scale = float(found @ embedded / (embedded @ embedded))
    if not (found - scale * embedded).norm() <= 1e-2 * found.norm():
        raise UnsupportedModelError("what enters the first layer is not the scaled embedding")
    return scale
