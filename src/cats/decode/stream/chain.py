"""The launches of one token of a conversation, and the buffers between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import proxy

import torch
from torch import Tensor

from cats.decode.state import State
from cats.decode.stream.buffers import Buffers
from cats.decode.stream.rotary import RotaryTables
from cats.decode.stream.spec import LayerSpec, Matrix, ModelSpec
from cats.ops.attention import cuda as attention
from cats.ops.choice import cuda as choice
from cats.ops.cuda.arguments import address, with_stamps
from cats.ops.cuda.device import multiprocessors
from cats.ops.cuda.function import Launch
from cats.ops.cuda.residual import Residual
from cats.ops.embedding import cuda as embedding
from cats.ops.linear import cuda as linear
from cats.ops.mlp.cuda import residual as feed_forward

# What the kernels note where they note times (trace.cuh): events of so many warps.
_TRACED_WARPS, _EVENTS = 32, 4


class Chain:
    """All launches of a token at one capacity of the cache.

    Attributes:
        buffers: What the launches leave to each other.
        stamps: ``[launches, blocks, warps, events]``, or None where it is not traced.
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
            state: A conversation of one row, whose cache holds its first tokens.
            embedding_scale: Multiplies the embedding.
            traced: Whether each warp notes in :attr:`stamps` when it starts, has its input, has
                worked on its last weights and ends.

        Raises:
            UnsupportedModelError: If a shape does not fit the kernels.
        """
        device = state.device
        # graphs read these very weights: they stay alive even if the model gets others
        spec = spec.detached()
        # the conversation keeps this: a cycle would leave both to the garbage collector
        self._spec, self._state, self._scale = spec, proxy(state), embedding_scale
        self._multiprocessors = multiprocessors(int(device.index or 0))
        self._options: Any = {"multiprocessors": self._multiprocessors, "traced": traced}

        self._columns = attention.columns_of(spec.heads, spec.key_heads)
        splits = attention.splits_of(state.capacity, self._columns, self._multiprocessors)
        self.buffers = Buffers.of(spec, device, splits=splits, columns=self._columns)
        self.stamps = self._empty_stamps() if traced else None
        self._rotary = RotaryTables(spec, state.capacity)

    def use_frequencies_of(self, length: int) -> None:
        """Rotate positions as the model does in a pass over so many tokens.

        Captured launches read the tables from the same place afterwards.
        """
        self._rotary.use_frequencies_of(length)

    def _empty_stamps(self) -> Tensor:
        """``[launches, blocks, warps, events]``, int64, nanoseconds; 0 where nothing was noted."""
        # the embedding, four a layer, the head and the choice
        launches = 4 * len(self._spec.layers) + 3
        at_once = attention.BLOCKS_ON_A_MULTIPROCESSOR * self._multiprocessors
        blocks = max(at_once, self._columns, choice.BLOCKS)
        shape = launches, blocks, _TRACED_WARPS, _EVENTS
        return torch.zeros(shape, dtype=torch.int64, device=self._state.device)

    def run(self, window: int) -> Tensor:
        """Launch it all on the current stream; returns logits ``[V]``, float32.

        Args:
            window: The newest token lies in one of the first ``window`` slots.
        """
        self._launch(self._token(window))
        if softcap := self._spec.logit_softcap:
            return softcap * (self.buffers.logits / softcap).tanh()
        return self.buffers.logits

    def run_greedily(self, window: int, padding: int) -> None:
        """Launch it all, take the likeliest token and move on.

        Args:
            window: The newest token lies in one of the first ``window`` slots.
            padding: The token of a row that has ended.
        """
        self._launch([*self._token(window), self._choice(padding)])

    def run_layer(self, index: int, x: Tensor, window: int) -> Tensor:
        """One layer alone, ``[D]``, float32, to float32."""
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
        return embedding.launch(
            table=self._spec.embedding,
            token=self._state.tokens,
            residual=self.buffers.residual,
            counters=self.buffers.tickets,
            scale=self._scale,
            traced=self.stamps is not None,
        )

    def _layer(self, index: int, window: int, alone: bool = False) -> list[Launch]:
        layers = self._spec.layers
        layer = layers[index]
        before = None if index == 0 or alone else layers[index - 1]
        b = self.buffers
        if layer.attention_post_norm is None:
            project = self._linear(
                layer.o, x=b.attended, add=b.residual, out=b.middle, copy=b.residual
            )
            mlp_input, mlp_output = self._normed(layer, layer.mlp_norm, b.middle), b.residual
        else:
            project = self._linear(layer.o, x=b.attended, out=b.branch, copy=b.sums)
            mlp_input = self._normed(
                layer, layer.mlp_norm, b.residual,
                delta=b.branch, delta_weight=layer.attention_post_norm, total=b.middle,
            )  # fmt: skip
            mlp_output = b.sums
        attention_input = self._after(before, layer, layer.attention_norm)
        # in a layer alone, behind kernels of which nothing is known
        early = not alone
        return [
            self._linear(layer.q, layer.k, layer.v, x=attention_input, out=b.qkv, early=early),
            self._attention(index, layer, window),
            project,
            self._mlp(index, layer, mlp_input, mlp_output),
        ]

    def _head(self) -> Launch:
        last = self._spec.layers[-1]
        x = self._after(last, last, self._spec.norm)
        return self._linear(self._spec.head, x=x, out=self.buffers.logits)

    def _choice(self, padding: int) -> Launch:
        state = self._state
        return choice.launch(
            logits=self.buffers.logits,
            best=self.buffers.best,
            arrived=self.buffers.arrived,
            token=state.tokens,
            position=state.positions,
            slot=state.slots,
            step=state.step,
            finished=state.finished,
            ends=state.eos,
            chosen=state.chosen,
            padding=padding,
            softcap=self._spec.logit_softcap,
            traced=self.stamps is not None,
        )

    def _after(self, before: LayerSpec | None, layer: LayerSpec, weight: Tensor) -> Residual:
        """The residual stream behind a layer, normed."""
        b = self.buffers
        if before is None or before.mlp_post_norm is None:
            return self._normed(layer, weight, b.residual)
        return self._normed(
            layer, weight, b.middle,
            delta=b.sums, delta_weight=before.mlp_post_norm, total=b.residual,
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
    ) -> Residual:
        return Residual(
            base=address(base),
            delta=address(delta),
            delta_weight=address(delta_weight),
            sum=address(total),
            weight=address(weight),
            epsilon=layer.epsilon,
            weight_offset=layer.weight_offset,
        )

    def _linear(self, *matrices: Matrix, x: Tensor | Residual, **buffers: Any) -> Launch:
        return linear.launch(
            [matrix.weight for matrix in matrices],
            [matrix.bias for matrix in matrices],
            x=x,
            **self._options,
            **buffers,
        )

    def _attention(self, index: int, layer: LayerSpec, window: int) -> Launch:
        state = self._state
        cosines, sines = self._rotary[layer.rotary]
        keys, values = state.cache.buffers()[2 * index : 2 * index + 2]
        return attention.launch(
            qkv=self.buffers.qkv,
            cosines=cosines,
            sines=sines,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            keys=keys,
            values=values,
            out=self.buffers.attended,
            slot=state.slots,
            position=state.positions,
            partials=self.buffers.partials,
            counters=self.buffers.counters,
            heads=self._spec.heads,
            window=layer.window,
            slots=window,
            scale=layer.scale,
            softcap=layer.softcap,
            epsilon=layer.epsilon,
            weight_offset=layer.weight_offset,
            **self._options,
        )

    def _mlp(self, index: int, layer: LayerSpec, x: Residual, sums: Tensor) -> Launch:
        mlp = layer.mlp
        return feed_forward.launch(
            x=x,
            gate=mlp.gate.weight,
            up=mlp.up.weight,
            down=mlp.down.weight,
            thresholds=mlp.thresholds,
            activation=mlp.activation,
            gate_bias=mlp.gate.bias,
            up_bias=mlp.up.bias,
            sums=sums,
            counters=self.buffers.tickets[index],
            **self._options,
        )

    @property
    def _traced(self) -> bool:
        return self.stamps is not None
