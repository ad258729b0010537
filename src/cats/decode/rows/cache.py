"""Keys and values of many sessions: one line of slots for each."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from cats.errors import BackendError


class RowLayer(CacheLayerMixin):
    """Keys and values of one layer, ``[lines, heads, slots, head_dim]``."""

    is_sliding = False

    def __init__(self, owner: RowCache, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # in a cycle, the buffers would stay until the garbage collector runs
        self._owner = ref(owner)
        self.keys, self.values = keys, values
        self.is_initialized = True

    @property
    def owner(self) -> RowCache:
        owner = self._owner()
        assert owner is not None, "a layer lives in its cache"
        return owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The buffers are there from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one token per row, and give the slots that attention reads."""
        owner = self.owner
        assert self.keys is not None
        assert self.values is not None
        keys, values = self.keys, self.values
        keys[owner.lines, :, owner.slots] = key_states[:, :, 0].to(keys.dtype)
        values[owner.lines, :, owner.slots] = value_states[:, :, 0].to(values.dtype)
        return owner.read(keys), owner.read(values)

    def get_seq_length(self) -> int:
        return self.owner.window - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.window, 0

    def get_max_length(self) -> int:
        return self.owner.capacity


class RowCache(Cache):
    """A cache in which each row of a batch has a line and a slot of its own.

    Attributes:
        capacity: Slots of a line.
        lines: The line of each row, ``[R]``.
        slots: The slot of each row's newest token, ``[R]``.
        window: Attention reads the first ``window`` slots.
        first: The first of the lines where they are consecutive, so that they are read without a
            copy; else None.
    """

    def __init__(self, samples: Sequence[Tensor], lines: int, capacity: int) -> None:
        """
        Args:
            samples: Keys and values of each layer in turn, ``[1, heads, any, head_dim]``.
            lines: How many lines.
            capacity: Slots of each.

        Raises:
            BackendError: If there is not so much memory.
        """
        self.capacity, self.window = capacity, 0
        self.first: int | None = None
        self.lines = self.slots = torch.zeros(0, dtype=torch.int64)
        # zeros, since attention multiplies the values of slots that it does not see by 0
        shapes = [(lines, t.shape[1], capacity, t.shape[3]) for t in samples]
        try:
            buffers = [t.new_zeros(shape) for t, shape in zip(samples, shapes, strict=True)]
        except RuntimeError as error:
            size = sum(prod(s) * t.itemsize for t, s in zip(samples, shapes, strict=True))
            raise BackendError(
                f"there is no memory for a cache of {lines * capacity:,} tokens, which takes "
                f"{size / 2**30:,.1f} GiB: give fewer rows, a smaller context or cache_tokens"
            ) from error
        pairs = zip(buffers[::2], buffers[1::2], strict=True)
        self.row_layers = [RowLayer(self, keys, values) for keys, values in pairs]
        super().__init__(layers=list(self.row_layers))

    def read(self, buffer: Tensor) -> Tensor:
        """The slots that attention reads, ``[R, heads, window, head_dim]``."""
        # slices that change nothing would stand in a trace
        if self.window < buffer.shape[2]:
            buffer = buffer[:, :, : self.window]
        if self.first is None:
            return buffer.index_select(0, self.lines)
        if len(self.lines) < len(buffer):
            buffer = buffer[self.first : self.first + len(self.lines)]
        return buffer

    def use_rows(
        self, lines: Sequence[int], slots: Tensor, window: int, device: torch.device
    ) -> None:
        """Set where the next tokens go, and what attention reads."""
        self.lines, self.slots, self.window = torch.tensor(lines, device=device), slots, window
        self.first = _first_of(lines)

    def consecutive(self, lines: Sequence[int], window: int) -> list[Tensor] | None:
        """Views of some lines, or None unless they are consecutive.

        Returns:
            Keys and values of each layer in turn, ``[R, heads, window, head_dim]``.
        """
        first = _first_of(lines)
        if first is None:
            return None
        return [t[first : first + len(lines), :, :window] for t in self.buffers()]

    def buffers(self) -> list[Tensor]:
        """Keys and values of each layer in turn."""
        return [t for layer in self.row_layers for t in (layer.keys, layer.values) if t is not None]

    def use(self, buffers: Sequence[Tensor]) -> None:
        """Use other buffers, such as those of a tracer."""
        for layer, keys, values in zip(self.row_layers, buffers[::2], buffers[1::2], strict=True):
            layer.keys, layer.values = keys, values

    def line(self, index: int) -> list[Tensor]:
        """Views of one line, ``[1, heads, slots, head_dim]``."""
        return [t[index : index + 1] for t in self.buffers()]

    def copy(self, source: int, target: int, slots: slice) -> None:
        """Copy what some slots of a line hold to another line."""
        for buffer in self.buffers():
            buffer[target, :, slots] = buffer[source, :, slots]

    def free(self) -> None:
        """Drop the buffers."""
        for layer in self.row_layers:
            layer.keys = layer.values = None

    def clear(self, line: int, slots: slice) -> None:
        """Zero some slots of a line: NaN in them would reach rows that do not even see them."""
        for buffer in self.buffers():
            buffer[line, :, slots] = 0


def _first_of(lines: Sequence[int]) -> int | None:
    """The first of consecutive numbers; None if they are not."""
    first = lines[0]
    return first if list(lines) == list(range(first, first + len(lines))) else None
