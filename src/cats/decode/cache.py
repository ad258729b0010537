"""The keys and values of a conversation, in buffers that stay where they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from cats.errors import UnsupportedModelError

# Layers that keep one key and one value a token. Sliding and chunked layers keep all of them here:
# their mask restricts what is read, and any prefix can be used again.
_KINDS = ("full_attention", "sliding_attention", "chunked_attention")


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, ``[B, heads, capacity, head_dim]``, one slot a token.

    Attributes:
        written: How many tokens each pass over the layer has written; see
            :meth:`SlotCache.expecting`.
    """

    is_sliding = False

    def __init__(self, owner: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # a cycle would leave the buffers to the garbage collector
        self._owner = ref(owner)
        self.written: list[int] = []

    @property
    def owner(self) -> SlotCache:
        """The cache, which says where the next tokens go and how many slots are read."""
        owner = self._owner()
        assert owner is not None, "a layer lives in its cache"
        return owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate both buffers in the shape and dtype of the first tokens."""
        self.keys, self.values = self._buffer(key_states), self._buffer(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens to their slots; returns views of all slots that are read."""
        self.written.append(key_states.shape[2])
        self.owner.check(self.written)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        keys, values = self.keys, self.values
        # into the buffers themselves: a traced step then changes its inputs, not views of them
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
        # zeros: an unused slot is masked, but 0 * NaN would still be NaN
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
    """A cache for a Hugging Face model in which the loop says where the next tokens go.

    Attributes:
        capacity: Slots of each buffer.
        start: Slots in use before the next tokens. Masks are made for it: a number, or a tensor
            ``[1]`` where one captured step must serve every slot.
        newest: The slot that the next token of each row is written to, ``[B]``, or ``[1]`` where
            all rows share it; None where several tokens are written from ``start`` on, a number
            then.
        window: Slots that attention reads, from the first; at least ``start`` and the new tokens.
    """

    def __init__(self, config: Any, capacity: int) -> None:
        """
        Raises:
            UnsupportedModelError: If a layer remembers something else than keys and values.
        """
        text = config.get_text_config(decoder=True)
        kinds, _ = get_layer_types_and_kwargs(text)
        # decoders of encoder-decoders count the encoder's layers as their own
        if (layers := getattr(text, "decoder_layers", None)) and set(kinds) == {"full_attention"}:
            kinds = ["full_attention"] * layers
        if others := sorted(set(kinds) - set(_KINDS)):
            raise UnsupportedModelError(
                f"the decode loop needs layers that cache keys and values; this model has "
                f"{', '.join(others)}: use model.generate"
            )
        self.capacity = capacity
        self.start: int | Tensor = 0
        self.newest: Tensor | None = None
        self.window = 0
        self._expected: tuple[int, str] | None = None
        self.slots = [SlotLayer(self) for _ in kinds]
        super().__init__(layers=list(self.slots))

    @contextmanager
    def expecting(self, tokens: int, model: str) -> Iterator[None]:
        """A forward pass that must write so many tokens, once in each layer.

        Raises:
            UnsupportedModelError: If the model wrote something else, or nothing.
        """
        self._expected = tokens, model
        for layer in self.slots:
            layer.written = []
        try:
            yield
            for index, layer in enumerate(self.slots):
                if not layer.written:
                    raise UnsupportedModelError(
                        f"layer {index} of {model} keeps nothing in its cache of keys and values, "
                        "so that earlier tokens would be forgotten: use model.generate"
                    )
        finally:
            self._expected = None

    def check(self, written: list[int]) -> None:
        """Complain about a layer that has not written what the running pass must write."""
        if self._expected is None or written == [self._expected[0]]:
            return
        tokens, model = self._expected
        found = f"{len(written)} times in one pass" if len(written) > 1 else f"{written[0]} tokens"
        raise UnsupportedModelError(
            f"{model} writes a layer's keys and values {found}, expected {tokens} tokens once "
            "(loops over layers, or virtual tokens of an adapter): use model.generate"
        )

    def grow(self, capacity: int) -> None:
        """Keep what is stored, in larger buffers."""
        self.capacity = capacity
        for layer in self.slots:
            layer.grow()

    def buffers(self) -> list[Tensor]:
        """Keys and values of each layer in turn, once the first tokens are there."""
        return [t for layer in self.slots for t in (layer.keys, layer.values) if t is not None]

    @contextmanager
    def lent(self, buffers: list[Tensor]) -> Iterator[None]:
        """Work on other buffers for a while, those of a tracer for one."""
        before = self.buffers()
        self._put(buffers)
        try:
            yield
        finally:
            self._put(before)

    def _put(self, buffers: list[Tensor]) -> None:
        for layer, keys, values in zip(self.slots, buffers[::2], buffers[1::2], strict=True):
            layer.keys, layer.values = keys, values
