"""Shows that the kernels compute what the layers of a model compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from cats.decode.forward import prefill
from cats.decode.state import State
from cats.decode.stream.spec import ModelSpec
from cats.errors import UnsupportedModelError
from cats.protocols import CausalModel, ModelConfig

# Largest error of a layer, as a share of what the layer adds to the residual stream; the median of
# _INPUTS inputs counts. In 16 bits, a rounding can move a neuron over its threshold. Where neurons
# are few, this changes the output much, but for few inputs. A wrong formula gives errors near 1.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
_INPUTS = 5
# Allowed on top of it, as a share of the residual stream, which a model rounds to its dtype.
_ROUNDING = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Largest error of the logits, as a share: the model rounds after every layer, the kernels do not.
_LOGITS_TOLERANCE = {torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 0.15}
# Inputs are small, so that what a layer adds is not small beside them.
_INPUT_SCALE = 0.1
# Attention reads these in one turn of a block, in several turns, and in several blocks.
LENGTHS = (1, 2, 37, 200, 300)
# Positional and named arguments of a layer.
_LayerArguments = tuple[tuple[Any, ...], dict[str, Any]]
# Keys and values of the longest context that is tried, at most.
_MAX_BYTES = 256 * 2**20


class RunnableChain(Protocol):
    """The kernels of a token of one conversation, as :class:`.chain.Chain` runs them."""

    def use_frequencies_of(self, length: int) -> None: ...

    def run(self, window: int) -> Tensor: ...

    def run_layer(self, index: int, x: Tensor, window: int) -> Tensor: ...


# Makes a chain from a specification, a conversation and the factor of the embedding.
MakeChain = Callable[[ModelSpec, State, float], RunnableChain]


def probe(
    model: nn.Module, spec: ModelSpec, make_chain: MakeChain, lengths: Sequence[int] = LENGTHS
) -> float:
    """Compare every layer with the model's own, after several numbers of tokens; then the logits.

    Args:
        model: On the device of the kernels.
        spec: Its specification.
        make_chain: Makes the kernels of a token.
        lengths: How many tokens come before the probed one. Lengths past the sliding window and the
            original context are added.

    Returns:
        What the model multiplies its embedding by.

    Raises:
        UnsupportedModelError: If something differs; the message says what.
    """
    config = cast(CausalModel, model).config.get_text_config(decoder=True)
    lengths = _lengths(spec, config, lengths)
    with torch.inference_mode():
        state = State(model, config, 1, lengths[-1] + 1)
        ids = torch.zeros(1, 1, dtype=torch.int64, device=state.device)
        prefill(model, state, ids, 0)  # allocates keys and values
        for stored in state.cache.buffers():
            stored.normal_()
        chain = make_chain(spec, state, 1.0)
        for length in lengths:
            _probe_layers(model, spec, state, chain, length)
        ids += 1
        scale = embedding_scale(model, spec, state, ids)
        state.tokens.copy_(ids)
        expected = prefill(model, state, ids, lengths[0]).float()[0]
        state.start_at(lengths[0])
        scaled_chain = make_chain(spec, state, scale)
        scaled_chain.use_frequencies_of(lengths[0] + 1)
        actual = scaled_chain.run(lengths[0] + 1)
        error = float((actual - expected).norm() / expected.norm())
        if not error <= _LOGITS_TOLERANCE[spec.dtype]:
            raise UnsupportedModelError(f"its logits differ from the kernels' by {error:.1%}")
    return scale


def _lengths(spec: ModelSpec, config: ModelConfig, lengths: Sequence[int]) -> list[int]:
    """The lengths in order, with some past what the configuration names, without too long ones."""
    slot_bytes = 2 * spec.key_heads * spec.head_size * spec.dtype.itemsize * len(spec.layers)
    context = getattr(config, "max_position_embeddings", None) or 2**62
    longest = min(_MAX_BYTES // slot_bytes, context) - 2
    parameters = getattr(config, "rope_parameters", None) or {}
    # from the configuration, since the specification may be wrong
    spans = (
        getattr(config, "sliding_window", None),
        parameters.get("original_max_position_embeddings"),
    )
    beyond = [int(span) + 3 for span in spans if span]
    return sorted({length for length in (*lengths, *beyond) if length <= longest})


def _probe_layers(
    model: nn.Module, spec: ModelSpec, state: State, chain: RunnableChain, length: int
) -> None:
    """Compare each layer on random inputs, after ``length`` other tokens."""
    chain.use_frequencies_of(length + 1)
    dtype, ids = spec.dtype, torch.zeros(1, 1, dtype=torch.int64, device=state.device)
    state.start_at(length)
    errors, sizes = [], []
    for _ in range(_INPUTS):
        inputs = torch.randn(len(spec.layers), spec.hidden_size, device=state.device)
        inputs = (_INPUT_SCALE * inputs).to(dtype)
        with _layer_inputs(spec, inputs) as outputs:
            prefill(model, state, ids, length)
        for index, (layer_input, output) in enumerate(zip(inputs, outputs, strict=True)):
            x, expected = layer_input.float(), output.float().view(-1)
            error = (chain.run_layer(index, x, length + 1) - expected).norm()
            errors.append(error - _ROUNDING[dtype] * x.norm())
            sizes.append((expected - x).norm())
    shares = torch.stack(errors) / torch.stack(sizes)
    for index, share in enumerate(shares.view(_INPUTS, -1).cpu().median(0).values.tolist()):
        if not share <= _TOLERANCE[dtype]:
            raise UnsupportedModelError(
                f"layer {index} differs from its kernels by {share:.1%} after {length} tokens"
            )


@contextmanager
def _layer_inputs(spec: ModelSpec, inputs: Tensor) -> Iterator[list[Tensor]]:
    """Within the block, layer ``i`` gets ``inputs[i]``. Yields the list that gets the outputs."""
    outputs: list[Tensor] = []

    def replace_input(index: int) -> Callable[..., _LayerArguments]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> _LayerArguments:
            x = inputs[index][None, None]
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        return hook

    def record(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [
        handle
        for index, layer in enumerate(spec.base.get_submodule("layers").children())
        for handle in (
            layer.register_forward_pre_hook(replace_input(index), with_kwargs=True),
            layer.register_forward_hook(record),
        )
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def embedding_scale(model: nn.Module, spec: ModelSpec, state: State, ids: Tensor) -> float:
    """What the model multiplies the embedding of a token ``[1, 1]`` by.

    Raises:
        UnsupportedModelError: If something else enters the first layer.
    """
    inputs: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    first = spec.base.get_submodule("layers.0")
    handle = first.register_forward_pre_hook(record, with_kwargs=True)
    try:
        prefill(model, state, ids, 0)
    finally:
        handle.remove()
    index = int(ids)
    embedded = spec.embedding.part(index, index + 1).matrix.dequantised()[0].float()
    entered = inputs[0].float().view(-1)
    scale = float(entered @ embedded / (embedded @ embedded))
    if not (entered - scale * embedded).norm() <= 1e-2 * entered.norm():
        raise UnsupportedModelError("what enters the first layer is not the scaled embedding")
    return scale
