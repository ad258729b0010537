"""The launches of one token of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import proxy

import torch
from torch import Tensor

from cats.decode.state import State
from cats.decode.stream.buffers import Buffers
from cats.decode.stream.launches import Launches, normed
from cats.decode.stream.rotary import RotaryTables
from cats.decode.stream.spec import LayerSpec, ModelSpec
from cats.ops.attention import cuda as attention
from cats.ops.choice import cuda as choice
from cats.ops.cuda.arguments import with_stamps
from cats.ops.cuda.device import multiprocessors
from cats.ops.cuda.function import Launch
from cats.ops.cuda.residual import Residual

# Times that a block writes (trace.cuh): of so many warps, so many events each.
_TRACED_WARPS, _EVENTS = 32, 4
# Where the launches of a layer take their tickets, in a row of the buffer. The MLP takes its own
# from the start.
_QKV_TICKET, _OUTPUT_TICKET = 8, 16


class Chain:
    """All launches of a token at one capacity of the cache.

    Attributes:
        buffers: What the launches pass on to each other.
        stamps: Times of the events, ``[launches, blocks, warps, events]``, int64, nanoseconds, 0
            where a warp wrote none; None without tracing.
    """

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
            state: A conversation of one row, after its first pass. Launches read and write its
                buffers.
            embedding_scale: Multiplies the embedding.
            traced: Whether each warp writes to :attr:`stamps` when it starts, when it has its
                input, when it has used its last weights, and when it ends.

        Raises:
            UnsupportedModelError: If a shape does not fit the kernels.
        """
        device = state.device
        # graphs read these weights, so they stay in memory even if the model gets new ones
        spec = spec.detached()
        # the state holds this chain: in a cycle, both would stay until the garbage collector runs
        self._spec, self._state, self._scale = spec, proxy(state), embedding_scale
        self._multiprocessors = multiprocessors(int(device.index or 0))
        grid = attention.grid_of(state.capacity, spec.heads, spec.key_heads, self._multiprocessors)
        self.buffers = Buffers.of(spec, device, splits=grid.splits)
        self._rotary = RotaryTables(spec, state.capacity)
        self._launches = Launches(
            spec=spec,
            state=self._state,
            buffers=self.buffers,
            rotary=self._rotary,
            multiprocessors=self._multiprocessors,
            traced=traced,
        )
        self.stamps = self._empty_stamps() if traced else None

    def use_frequencies_of(self, length: int) -> None:
        """Rotate positions as the model does in a pass over ``length`` tokens.

        Captured launches see the change: the tables keep their addresses.
        """
        self._rotary.use_frequencies_of(length)

    def _empty_stamps(self) -> Tensor:
        # the choice comes after them
        launches = len(self._token(1)) + 1
        at_once = attention.BLOCKS_ON_A_MULTIPROCESSOR * self._multiprocessors
        blocks = max(at_once, self._spec.heads, choice.BLOCKS)
        shape = launches, blocks, _TRACED_WARPS, _EVENTS
        return torch.zeros(shape, dtype=torch.int64, device=self._state.device)

    def run(self, window: int) -> Tensor:
        """Run the newest token on the current stream; returns logits ``[V]``, float32.

        Args:
            window: The newest token's slot is one of the first ``window``.
        """
        self._launch(self._token(window))
        if softcap := self._spec.logit_softcap:
            return softcap * (self.buffers.logits / softcap).tanh()
        return self.buffers.logits

    def run_greedily(self, window: int, padding: int) -> None:
        """Run the newest token, take the likeliest next one, and count slot, position and step on.

        Args:
            window: The newest token's slot is one of the first ``window``.
            padding: The token of a row that has ended.
        """
        self._launch([*self._token(window), self._launches.choice(padding)])

    def choose(self, padding: int) -> None:
        """The end of :meth:`run_greedily`, for the logits that are in the buffers."""
        self._launch([self._launches.choice(padding)])

    def run_layer(self, index: int, x: Tensor, window: int) -> Tensor:
        """The output of one layer for an input ``[D]``, float32; both are the residual stream."""
        self.buffers.tickets.zero_()
        self.buffers.residual.copy_(x)
        layer = self._spec.layers[index]
        self._launch(self._layer(index, window, alone=True))
        if layer.mlp_post_norm is None:
            return self.buffers.residual.clone()
        sums = self.buffers.sums
        norm = sums * torch.rsqrt(sums.square().mean() + layer.epsilon)
        return self.buffers.middle + norm * (layer.mlp_post_norm.float() + layer.weight_offset)

    def _launch(self, launches: Sequence[Launch]) -> None:
        stream = torch.cuda.current_stream(self._state.device).cuda_stream
        for number, launch in enumerate(launches):
            arguments = launch.arguments
            if self.stamps is not None:
                assert launch.blocks * launch.columns <= self.stamps.shape[1]
                arguments = with_stamps(arguments, self.stamps[number])
            # A dependent launch may start early. That is right after kernels of this chain: they
            # write no weights, and none ends before those before it. Other kernels may do both.
            launch.function.launch(
                arguments,
                blocks=launch.blocks,
                columns=launch.columns,
                stream=stream,
                dependent=number > 0,
            )

    def _token(self, window: int) -> list[Launch]:
        layers = range(len(self._spec.layers))
        return [
            self._launches.embedding(self._scale),
            *(launch for index in layers for launch in self._layer(index, window)),
            *self._head(),
        ]

    def _layer(self, index: int, window: int, alone: bool = False) -> list[Launch]:
        layers = self._spec.layers
        layer = layers[index]
        previous = None if index == 0 or alone else layers[index - 1]
        b = self.buffers
        tickets = b.tickets[index]
        if layer.attention_post_norm is None:
            project = self._launches.linear(
                layer.o,
                x=b.attended,
                add=b.residual,
                out=b.middle,
                copy=b.residual,
                tickets=tickets[_OUTPUT_TICKET:],
            )
            mlp_input, mlp_output = normed(layer, layer.mlp_norm, b.middle), b.residual
        else:
            project = self._launches.linear(
                layer.o, x=b.attended, out=b.branch, copy=b.sums, tickets=tickets[_OUTPUT_TICKET:]
            )
            mlp_input = normed(
                layer,
                layer.mlp_norm,
                b.residual,
                delta=b.branch,
                delta_weight=layer.attention_post_norm,
                total=b.middle,
            )
            mlp_output = b.sums
        attention_input = self._after(previous, layer, layer.attention_norm)
        # a layer alone follows kernels that may write its weights
        early = not alone
        return [
            *self._launches.linear(
                layer.q,
                layer.k,
                layer.v,
                x=attention_input,
                out=b.qkv,
                early=early,
                tickets=tickets[_QKV_TICKET:],
            ),
            self._launches.attention(index, layer, window),
            *project,
            self._launches.mlp(layer, mlp_input, sums=mlp_output, tickets=tickets),
        ]

    def _head(self) -> list[Launch]:
        last = self._spec.layers[-1]
        x = self._after(last, last, self._spec.norm)
        b = self.buffers
        return self._launches.linear(self._spec.head, x=x, out=b.logits, tickets=b.tickets[-1])

    def _after(self, previous: LayerSpec | None, layer: LayerSpec, weight: Tensor) -> Residual:
        """The norm of the residual stream after a layer; None for the embedding."""
        b = self.buffers
        if previous is None or previous.mlp_post_norm is None:
            return normed(layer, weight, b.residual)
        return normed(
            layer,
            weight,
            b.middle,
            delta=b.sums,
            delta_weight=previous.mlp_post_norm,
            total=b.residual,
        )
