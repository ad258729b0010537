"""The launches of one token of a conversation, and the buffers between them."""

from __future__ import annotations

import inspect
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import proxy

import torch
from torch import Tensor

from cats.decode.state import State
from cats.decode.stream.spec import LayerSpec, Matrix, ModelSpec
from cats.errors import UnsupportedModelError
from cats.ops.cuda.function import Function
from cats.ops.cuda.kernel import shares_of
from cats.ops.cuda.variant import DTYPES, VECTOR_BYTES, shared_memory, variant_for

# The structs of the sources.
_EMBEDDING = struct.Struct("4Qif")
_RESIDUAL = struct.Struct("5Q2f")
_LINEAR = struct.Struct("48s10Q4i")
_ATTENTION = struct.Struct("12Q3i4f4x")
_MLP = struct.Struct("13Q6i48s")
_CHOICE = struct.Struct("10Qq2if4x")
# What they begin with where the kernels note times, of so many warps and events (trace.cuh).
_STAMPS = struct.Struct("Q")
_TRACED_WARPS, _EVENTS = 32, 4

_WARPS = 8
_EMBEDDING_BLOCKS = 4
_CHOICE_BLOCKS = 64
# A row is cut into parts of at most so many bytes, of which each warp has several in flight.
_PART_BYTES = 8192
_MIN_STAGES, _MAX_STAGES = 3, 8
# On their way to one multiprocessor while the kernel in front still runs: about what keeps the
# memory busy, so that little of what that kernel reads and adds, and of what it leaves to be read,
# waits behind them.
_EARLY_BYTES = 32 * 1024
# Shared memory that a ring leaves to the block of attention beside it, and to the system.
_SPARE_BYTES = 24 * 1024
_MAX_QUERIES = 4  # query heads of a block: more would not fit into its registers
_MAX_HEAD = 256
# Merging splits takes as long as a block takes for about so many slots: timed with heads of 64 and
# 128 in 16 bits. Wider ones take more turns for them.
_UNSPLIT_SLOTS = 256
_SLOTS_A_SPLIT = 64
_MAX_SPLITS = 64
_BLOCKS_OF_ATTENTION = 2  # on a multiprocessor, so that one reads while the other computes
_TICKET_STRIDE = 32  # a cache line


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch; ``arguments`` are the struct of its source."""

    function: Function
    arguments: bytes
    blocks: int
    columns: int = 1


class Chain:
    """All launches of a token at one capacity of the cache, over buffers of its own."""

    def __init__(
        self,
        spec: ModelSpec,
        state: State,
        embedding_scale: float = 1.0,
        *,
        traced: bool = False,
    ) -> None:
        """
        Args:
            spec: The model.
            state: A conversation of one row, whose cache holds its first tokens.
            embedding_scale: Multiplies the embedding.
            traced: Whether each warp notes in :attr:`stamps` when it starts, has its input, has
                worked on its last weights and ends.

        Raises:
            UnsupportedModelError: If a shape does not fit the kernels.
        """
        device, D = state.device, spec.hidden_size
        # graphs read these very weights: they stay alive even if the model gets others
        spec = spec.detached()
        # the conversation keeps this: a cycle would leave both to the garbage collector
        self._spec, self._state, self._scale = spec, proxy(state), embedding_scale
        self._device = int(device.index or 0)
        self._multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        query_size = spec.heads * spec.head_size
        self._residual, self._middle = floats(D), floats(D)
        self._branch, self._sums = floats(D), floats(D)
        self._qkv = floats(query_size + 2 * spec.key_heads * spec.head_size)
        self._attended = torch.zeros(query_size, dtype=spec.dtype, device=device)
        self._logits = floats(len(spec.head.weight))
        self._splits = _most_splits(state.capacity, self._attention_columns, self._multiprocessors)
        self._partials = floats(self._splits, spec.heads, spec.head_size + 2)
        self._counters = torch.zeros(self._attention_columns, dtype=torch.int32, device=device)
        self._tickets = torch.zeros(
            len(spec.layers), _TICKET_STRIDE, dtype=torch.int32, device=device
        )
        self._best = floats(2, _CHOICE_BLOCKS)
        self.stamps = self._empty_stamps() if traced else None
        self._arrived = torch.zeros(1, dtype=torch.int32, device=device)
        self._frequencies: int | None = None
        self._rotary: dict[str, tuple[Tensor, Tensor]] = {}
        self.use_frequencies_of(1)

    def use_frequencies_of(self, length: int) -> None:
        """Rotate positions as the model does in a pass over so many tokens.

        Captured launches read the tables from the same place afterwards.
        """
        rule, capacity = self._spec.length_rule, self._state.capacity
        number = 0 if rule is None else rule.range_of(length)
        if number == self._frequencies:
            return
        # a model chooses its frequencies by the largest position of a pass
        slots = capacity if rule is None or number else min(capacity, rule.original)
        for kind in {layer.rotary for layer in self._spec.layers}:
            tables = _rotary_table(self._spec, kind, slots)
            if kind not in self._rotary:
                empty = [t.new_zeros(capacity, t.shape[1]) for t in tables]
                self._rotary[kind] = empty[0], empty[1]
            for table, new in zip(self._rotary[kind], tables, strict=True):
                table[:slots] = new
        self._frequencies = number

    def _empty_stamps(self) -> Tensor:
        """``[launches, blocks, warps, events]``, int64, nanoseconds; 0 where nothing was noted."""
        # the embedding, four a layer, the head and the choice
        launches = 4 * len(self._spec.layers) + 3
        blocks = max(
            _BLOCKS_OF_ATTENTION * self._multiprocessors, self._attention_columns, _CHOICE_BLOCKS
        )
        shape = launches, blocks, _TRACED_WARPS, _EVENTS
        return torch.zeros(shape, dtype=torch.int64, device=self._state.device)

    def run(self, window: int) -> Tensor:
        """Launch it all on the current stream; returns logits ``[V]``, float32.

        Args:
            window: The newest token lies in one of the first ``window`` slots.
        """
        self._launch(self._token(window))
        if softcap := self._spec.logit_softcap:
            return softcap * (self._logits / softcap).tanh()
        return self._logits

    def run_greedily(self, window: int, padding: int) -> None:
        """Launch it all, take the likeliest token and move on.

        Args:
            window: The newest token lies in one of the first ``window`` slots.
            padding: The token of a row that has ended.
        """
        self._launch([*self._token(window), self._choice(padding)])

    def run_layer(self, index: int, x: Tensor, window: int) -> Tensor:
        """One layer alone, ``[D]``, float32, to float32."""
        self._tickets.zero_()
        self._residual.copy_(x)
        layer = self._spec.layers[index]
        self._launch(self._layer(index, window, alone=True))
        if layer.mlp_post_norm is None:
            return self._residual.clone()
        sums = self._sums
        norm = sums * torch.rsqrt(sums.square().mean() + layer.epsilon)
        return self._middle + norm * (layer.mlp_post_norm.float() + layer.weight_offset)

    def _launch(self, launches: Sequence[Launch]) -> None:
        stream = torch.cuda.current_stream(self._state.device).cuda_stream
        for number, launch in enumerate(launches):
            arguments = launch.arguments
            if self.stamps is not None:
                assert launch.blocks * launch.columns <= self.stamps.shape[1]
                arguments = _STAMPS.pack(_address(self.stamps[number])) + arguments
            # The first follows a kernel of which nothing is known. The others follow one of this
            # chain, none of which writes a weight or ends before all in front of it.
            launch.function.launch(
                arguments, blocks=launch.blocks, columns=launch.columns, stream=stream,
                dependent=number > 0,
            )  # fmt: skip

    def _token(self, window: int) -> list[Launch]:
        layers = range(len(self._spec.layers))
        return [
            self._embedding(),
            *(launch for index in layers for launch in self._layer(index, window)),
            self._head(),
        ]

    def _embedding(self) -> Launch:
        spec = self._spec
        function = _embedding_function(
            self._device, spec.hidden_size, spec.dtype, traced=self._traced
        )
        arguments = _EMBEDDING.pack(
            *map(_address, (spec.embedding, self._state.tokens, self._residual, self._tickets)),
            self._tickets.numel(), self._scale,
        )  # fmt: skip
        return Launch(function, arguments, _EMBEDDING_BLOCKS)

    def _layer(self, index: int, window: int, alone: bool = False) -> list[Launch]:
        layers = self._spec.layers
        layer = layers[index]
        before = None if index == 0 or alone else layers[index - 1]
        sandwich = layer.attention_post_norm is not None
        if sandwich:
            project = self._linear([layer.o], x=self._attended, out=self._branch, copy=self._sums)
            into = self._normed(
                layer, layer.mlp_norm, self._residual,
                delta=self._branch, delta_weight=layer.attention_post_norm, total=self._middle,
            )  # fmt: skip
        else:
            project = self._linear(
                [layer.o],
                x=self._attended,
                add=self._residual,
                out=self._middle,
                copy=self._residual,
            )
            into = self._normed(layer, layer.mlp_norm, self._middle)
        return [
            self._linear(
                [layer.q, layer.k, layer.v],
                residual=self._after(before, layer, layer.attention_norm), out=self._qkv,
                # behind kernels of which nothing is known
                early=not alone,
            ),
            self._attention(index, layer, window),
            project,
            self._mlp(index, layer, into, self._sums if sandwich else self._residual),
        ]  # fmt: skip

    def _head(self) -> Launch:
        spec = self._spec
        last = spec.layers[-1]
        return self._linear(
            [spec.head], residual=self._after(last, last, spec.norm), out=self._logits
        )

    def _choice(self, padding: int) -> Launch:
        state, (values, indices) = self._state, self._best
        arguments = _CHOICE.pack(
            *map(
                _address,
                (
                    self._logits, values, indices, self._arrived, state.tokens, state.positions,
                    state.slot, state.finished, state.eos, state.chosen,
                ),
            ),
            padding, len(self._logits), len(state.eos), self._spec.logit_softcap,
        )  # fmt: skip
        function = _choice_function(self._device, traced=self._traced)
        return Launch(function, arguments, _CHOICE_BLOCKS)

    def _after(self, before: LayerSpec | None, layer: LayerSpec, weight: Tensor) -> bytes:
        """The residual stream behind a layer, normed."""
        if before is None or before.mlp_post_norm is None:
            return self._normed(layer, weight, self._residual)
        return self._normed(
            layer, weight, self._middle,
            delta=self._sums, delta_weight=before.mlp_post_norm, total=self._residual,
        )  # fmt: skip

    def _normed(
        self,
        layer: LayerSpec,
        weight: Tensor,
        base: Tensor,
        *,
        delta: Tensor | None = None,
        delta_weight: Tensor | None = None,
        total: Tensor | None = None,
    ) -> bytes:
        pointers = map(_address, (base, delta, delta_weight, total, weight))
        return _RESIDUAL.pack(*pointers, layer.epsilon, layer.weight_offset)

    def _linear(
        self,
        matrices: list[Matrix],
        *,
        out: Tensor,
        residual: bytes | None = None,
        x: Tensor | None = None,
        add: Tensor | None = None,
        copy: Tensor | None = None,
        early: bool = True,
    ) -> Launch:
        width = matrices[0].weight.shape[1]
        rows = [len(matrix.weight) for matrix in matrices]
        normed = residual is not None
        function = _linear_function(
            self._device, width, self._spec.dtype, normed=normed, traced=self._traced
        )
        ends = [sum(rows[: i + 1]) for i in range(len(rows))]
        missing = 3 - len(rows)
        blocks = min(self._multiprocessors, ends[-1])
        arguments = _LINEAR.pack(
            residual or bytes(_RESIDUAL.size),
            _address(x),
            *(_address(m.weight) for m in matrices), *[0] * missing,
            *(_address(m.bias, 1) for m in matrices), *[0] * missing,
            _address(add), _address(out), _address(copy),
            *ends, *[ends[-1]] * missing, early,
        )  # fmt: skip
        return Launch(function, arguments, blocks)

    @property
    def _traced(self) -> bool:
        return self.stamps is not None

    @property
    def _queries(self) -> int:
        """Query heads of a key head."""
        return self._spec.heads // self._spec.key_heads

    @property
    def _attention_columns(self) -> int:
        return self._spec.key_heads * math.ceil(self._queries / _queries_a_block(self._queries))

    def _attention(self, index: int, layer: LayerSpec, window: int) -> Launch:
        spec, state = self._spec, self._state
        cosines, sines = self._rotary[layer.rotary]
        function = _attention_function(
            self._device, spec.dtype, spec.head_size, cosines.shape[1], self._queries,
            layer.q_norm is not None, layer.softcap > 0, traced=self._traced,
        )  # fmt: skip
        keys, values = state.cache.buffers()[2 * index : 2 * index + 2]
        columns = self._attention_columns
        splits = _most_splits(min(window, layer.window), columns, self._multiprocessors)
        arguments = _ATTENTION.pack(
            *map(
                _address,
                (
                    self._qkv, cosines, sines, layer.q_norm, layer.k_norm, keys, values,
                    self._attended, state.slot, state.positions, self._partials, self._counters,
                ),
            ),
            spec.key_heads, state.capacity, layer.window,
            layer.scale, layer.softcap, layer.epsilon, layer.weight_offset,
        )  # fmt: skip
        return Launch(function, arguments, splits, columns)

    def _mlp(self, index: int, layer: LayerSpec, residual: bytes, target: Tensor) -> Launch:
        mlp = layer.mlp
        neurons, hidden = mlp.gate.weight.shape
        function, variant = _mlp_function(
            self._device, hidden, self._spec.dtype, mlp.activation, traced=self._traced
        )
        shares = shares_of(variant, neurons, self._multiprocessors, False)
        arguments = _MLP.pack(
            0, *map(_address, (mlp.gate.weight, mlp.up.weight, mlp.down.weight)),
            _address(mlp.thresholds, 1), 0,
            _address(mlp.gate.bias, 1), _address(mlp.up.bias, 1), 0, 0,
            _address(target), 0, _address(self._tickets[index]),
            neurons, shares.fixed_runs, shares.long_tickets, shares.short_rows, 1, 1,
            residual,
        )  # fmt: skip
        return Launch(function, arguments, shares.blocks)


def _address(tensor: Tensor | None, alignment: int = VECTOR_BYTES) -> int:
    """Of the first element; 0 for None."""
    address = 0 if tensor is None else tensor.data_ptr()
    if address % alignment:
        raise UnsupportedModelError(
            f"a tensor starts at address {address:#x}, expected a multiple of {alignment} bytes: "
            "it is a view into a larger one; clone it"
        )
    return address


def _queries_a_block(queries: int) -> int:
    """Query heads of a block, so that all blocks of a key head have about as many."""
    return math.ceil(queries / math.ceil(queries / _MAX_QUERIES))


def _most_splits(slots: int, columns: int, multiprocessors: int) -> int:
    """Blocks that share the slots of a head: enough to fill the GPU, each with enough to do."""
    if slots <= _UNSPLIT_SLOTS:
        return 1
    blocks = _BLOCKS_OF_ATTENTION * multiprocessors
    return max(1, min(math.ceil(slots / _SLOTS_A_SPLIT), blocks // columns, _MAX_SPLITS))


def _rotary_table(spec: ModelSpec, kind: str, slots: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, ``[slots, R]``, float32, as the model's own module computes them."""
    rotary: Any = spec.base.rotary_emb
    positions = torch.arange(slots, device=spec.norm.device)[None]
    like = torch.zeros(1, 1, 1, device=spec.norm.device)
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        cosines, sines = rotary(like, positions, kind)
    else:
        cosines, sines = rotary(like, positions)
    return cosines[0].contiguous(), sines[0].contiguous()


@cache
def _embedding_function(
    device: int, width: int, dtype: torch.dtype, *, traced: bool = False
) -> Function:
    defines = dict(DTYPE=DTYPES[dtype], WIDTH=width, TRACE=int(traced))
    return Function(device, "embedding", defines, threads=32 * _WARPS, shared_bytes=0)


@cache
def _choice_function(device: int, *, traced: bool = False) -> Function:
    defines = dict(DTYPE=DTYPES[torch.float32], TRACE=int(traced))
    return Function(device, "choose", defines, threads=32 * _WARPS, shared_bytes=0)


@cache
def _linear_function(
    device: int, width: int, dtype: torch.dtype, *, normed: bool, traced: bool = False
) -> Function:
    row = width * dtype.itemsize
    if row % VECTOR_BYTES:
        raise UnsupportedModelError(
            f"rows must be a multiple of {VECTOR_BYTES} bytes, {width} columns have {row}"
        )
    room = (shared_memory(device) - row - _SPARE_BYTES) // _WARPS
    most = min(_PART_BYTES, room // _MIN_STAGES)
    if most < 32 * VECTOR_BYTES:
        raise UnsupportedModelError(f"rows of {row} bytes are too long for the shared memory")
    parts = math.ceil(row / most)
    part = math.ceil(row / VECTOR_BYTES / parts) * VECTOR_BYTES
    parts = math.ceil(row / part)  # fewer, where rounding up made the last ones empty
    stages = min(_MAX_STAGES, room // part)
    defines = dict(
        DTYPE=DTYPES[dtype], WIDTH=width, NORMED=int(normed), WARPS=_WARPS, STAGES=stages,
        PARTS=parts, EARLY_PARTS=max(1, _EARLY_BYTES // part), TRACE=int(traced),
    )  # fmt: skip
    # parts, x, barriers, slots, and what alignment may add
    shared = _WARPS * stages * (part + 8) + row + 4 * _WARPS + 256
    threads = 32 * (_WARPS + 1)
    return Function(device, "linear", defines, threads=threads, shared_bytes=shared)


@cache
def _attention_function(
    device: int,
    dtype: torch.dtype,
    head: int,
    rotary: int,
    queries: int,
    head_norm: bool,
    softcap: bool,
    *,
    traced: bool = False,
) -> Function:
    if head > _MAX_HEAD or head * dtype.itemsize % VECTOR_BYTES or rotary > head or rotary % 2:
        raise UnsupportedModelError(
            f"heads of {head} columns, {rotary} of them rotated: expected at most {_MAX_HEAD}, "
            f"and a multiple of {VECTOR_BYTES} bytes"
        )
    defines = dict(
        DTYPE=DTYPES[dtype], HEAD=head, ROTARY=rotary, HEADS=_queries_a_block(queries),
        QUERIES=queries, UNSPLIT_SLOTS=_UNSPLIT_SLOTS, SPLIT_SLOTS=_SLOTS_A_SPLIT,
        MAX_SPLITS=_MAX_SPLITS, HEAD_NORM=int(head_norm), SOFTCAP=int(softcap),
        TRACE=int(traced),
    )  # fmt: skip
    return Function(device, "attention", defines, threads=32 * _WARPS, shared_bytes=0)


@cache
def _mlp_function(
    device: int, hidden: int, dtype: torch.dtype, activation: str, *, traced: bool = False
) -> tuple[Function, Any]:
    limit = shared_memory(device)
    variant = variant_for(hidden, dtype, 1, activation, shared_limit=limit, residual=True)
    if variant is None:
        raise UnsupportedModelError(f"a hidden size of {hidden} does not fit the MLP's kernel")
    function = Function(
        device, "gated_mlp", variant.defines() | {"TRACE": int(traced)},
        threads=variant.threads, shared_bytes=variant.shared_bytes,
    )  # fmt: skip
    return function, variant
