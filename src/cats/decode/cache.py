"""The keys and values of a conversation, in buffers whose addresses do not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from cats.errors import UnsupportedModelError
from cats.protocols import ModelConfig

# Layers that store one key and one value per token. Sliding and chunked layers store all of them
# here: their mask restricts what is read, and any prefix can be used again.
_KINDS = ("full_attention", "sliding_attention", "chunked_attention")


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, ``[B, heads, capacity, head_dim]``, one slot per token.

    Attributes:
        written: How many tokens each call of :meth:`update` has written since
            :meth:`SlotCache.expecting`.
    """

    is_sliding = False

    def __init__(self, owner: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # in a cycle, the buffers would stay until the garbage collector runs
        self._owner = ref(owner)
        self.written: list[int] = []

    @property
    def owner(self) -> SlotCache:
        """The cache that the layer belongs to."""
        owner = self._owner()
        assert owner is not None, "a layer lives in its cache"
        return owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate both buffers, for states like these."""
        self.keys, self.values = self._buffer(key_states), self._buffer(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens to their slots; returns views of the slots that attention reads."""
        self.written.append(key_states.shape[2])
        self.owner.check(self.written)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        keys, values = self.keys, self.values
        # written into the buffers, not into views: a traced step then changes its inputs
        slots = self.owner.newest
        if slots is not None and len(slots) == 1:
            keys.index_copy_(2, slots, key_states.to(keys.dtype))
            values.index_copy_(2, slots, value_states.to(values.dtype))
        elif slots is not None:
            rows = torch.arange(len(slots), device=slots.device)
            keys[rows, :, slots] = key_states[:, :, 0].to(keys.dtype)
            values[rows, :, slots] = value_states[:, :, 0].to(values.dtype)
        else:
            start = self.owner.start
            assert isinstance(start, int)
            end = start + key_states.shape[2]
            keys[:, :, start:end] = key_states
            values[:, :, start:end] = value_states
        if self.owner.window < keys.shape[2]:
            return keys[:, :, : self.owner.window], values[:, :, : self.owner.window]
        return keys, values

    def grow(self) -> None:
        """Move to buffers of the owner's capacity."""
        if self.is_initialized:
            assert self.keys is not None
            assert self.values is not None
            self.keys, self.values = self._moved(self.keys), self._moved(self.values)

    def _buffer(self, states: Tensor) -> Tensor:
        batch, heads, _, size = states.shape
        # zeros, since attention multiplies the values of unused slots by 0, and 0 * NaN is NaN
        return states.new_zeros(batch, heads, self.owner.capacity, size)

    def _moved(self, states: Tensor) -> Tensor:
        buffer = self._buffer(states)
        buffer[:, :, : states.shape[2]] = states
        return buffer

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]
        start = self.owner.start
        return start[0] if isinstance(start, Tensor) else start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.window, 0

    def get_max_length(self) -> int:
        return self.owner.capacity


class SlotCache(Cache):
    """A cache for a Hugging Face model; the decode loop sets where the next tokens go.

    Attributes:
        capacity: Slots of each buffer.
        start: Slots in use before the next tokens, from which the model makes its masks. A number,
            or a tensor ``[1]`` that a traced step reads.
        newest: The slot of each row's next token, ``[B]``, or ``[1]`` where rows share it. None
            where several tokens are written from ``start`` on, which is a number then.
        window: Attention reads the first ``window`` slots, the new tokens among them.
        kinds: The kind of each layer, such as ``"sliding_attention"``.
    """

    def __init__(self, config: ModelConfig, capacity: int) -> None:
        """
        Raises:
            UnsupportedModelError: If a layer stores something else than keys and values.
        """
        text = config.get_text_config(decoder=True)
        kinds, _ = get_layer_types_and_kwargs(cast(PreTrainedConfig, text))
        # decoders of encoder-decoders count the encoder's layers as their own
        if (layers := getattr(text, "decoder_layers", None)) and set(kinds) == {"full_attention"}:
            kinds = ["full_attention"] * layers
        if others := sorted(set(kinds) - set(_KINDS)):
            raise UnsupportedModelError(
                f"the decode loop needs layers that cache keys and values; this model has "
                f"{', '.join(others)}: use model.generate"
            )
        self.capacity = capacity
        self.kinds: list[str] = list(kinds)
        self.start: int | Tensor = 0
        self.newest: Tensor | None = None
        self.window = 0
        self._expected: tuple[int, str] | None = None
        self.slot_layers = [SlotLayer(self) for _ in kinds]
        super().__init__(layers=list(self.slot_layers))

    @contextmanager
    def expecting(self, tokens: int, model: str) -> Iterator[None]:
        """Around a forward pass that must write ``tokens`` tokens, once in each layer.

        Raises:
            UnsupportedModelError: If a layer wrote another number of them, or nothing.
        """
        self._expected = tokens, model
        for layer in self.slot_layers:
            layer.written = []
        try:
            yield
            for index, layer in enumerate(self.slot_layers):
                if not layer.written:
                    raise UnsupportedModelError(
                        f"layer {index} of {model} keeps nothing in its cache of keys and values, "
                        "so that earlier tokens would be forgotten: use model.generate"
                    )
        finally:
            self._expected = None

    def check(self, written: list[int]) -> None:
        """
        Raises:
            UnsupportedModelError: If a layer has not written what the running pass must write.
        """
        if self._expected is None or written == [self._expected[0]]:
            return
        tokens, model = self._expected
        actual = f"{len(written)} times in one pass" if len(written) > 1 else f"{written[0]} tokens"
        raise UnsupportedModelError(
            f"{model} writes a layer's keys and values {actual}, expected {tokens} tokens once "
            "(loops over layers, or virtual tokens of an adapter): use model.generate"
        )

    def grow(self, capacity: int) -> None:
        """Move what is stored to larger buffers."""
        self.capacity = capacity
        for layer in self.slot_layers:
            layer.grow()

    def buffers(self) -> list[Tensor]:
        """Keys and values of each layer in turn; empty before the first tokens."""
        return [
            t for layer in self.slot_layers for t in (layer.keys, layer.values) if t is not None
        ]

    @contextmanager
    def working_on(self, buffers: list[Tensor]) -> Iterator[None]:
        """Use other buffers within the block, such as those of a tracer."""
        own = self.buffers()
        self._use(buffers)
        try:
            yield
        finally:
            self._use(own)

    def _use(self, buffers: list[Tensor]) -> None:
        for layer, keys, values in zip(self.slot_layers, buffers[::2], buffers[1::2], strict=True):
            layer.keys, layer.values = keys, values
