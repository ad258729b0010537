"""The launches of one token of each of several rows, whose lengths differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cats.decode.stream.launches import normed
from cats.decode.stream.rotary import RotaryTables
from cats.decode.stream.row_buffers import RowBuffers
from cats.decode.stream.spec import LayerSpec, ModelSpec
from cats.errors import UnsupportedModelError
from cats.model import Linear
from cats.ops.attention import rows as attention
from cats.ops.choice import rows as choice
from cats.ops.cuda.function import Launch
from cats.ops.cuda.residual import Residual
from cats.ops.embedding import rows as embedding
from cats.ops.linear import rows as linear
from cats.ops.mlp.cuda import rows as mlp
from cats.ops.rms_norm import rows as norm
from cats.weights import Dense


class RowChain:
    """All launches of a step of so many rows.

    Attributes:
        rows: How many.
    """

    def __init__(
        self,
        spec: ModelSpec,
        buffers: RowBuffers,
        cache: Sequence[Tensor],
        rotary: RotaryTables,
        rows: int,
        *,
        embedding_scale: float,
        multiprocessors: int,
    ) -> None:
        """
        Args:
            spec: The model; graphs read its weights, so they must stay in memory.
            buffers: For at least so many rows.
            cache: Keys and values of each layer in turn, ``[lines, key heads, capacity, H]``.
            rotary: Cosines and sines of each position.
            rows: One of :data:`cats.ops.cuda.rows_input.TOKENS`.
            embedding_scale: Multiplies the embedding.
            multiprocessors: How many the GPU has.

        Raises:
            UnsupportedModelError: If the kernels of several rows do not take the weights.
        """
        self._spec, self._cache, self._rotary = spec, cache, rotary
        self._scale, self._multiprocessors = embedding_scale, multiprocessors
        self._buffers, self.rows = buffers.first(rows), rows
        # compiles the kernels
        self._token(cache[0].shape[2])
        self._choice()

    def run(self, window: int) -> Tensor:
        """Run the newest token of each row on the current stream; returns logits ``[rows, V]``.

        Args:
            window: The slot of each newest token is one of the first ``window``.
        """
        self._launch(self._token(window))
        logits, softcap = self._buffers.logits, self._spec.logit_softcap
        return softcap * (logits / softcap).tanh() if softcap else logits

    def run_greedily(self, window: int) -> None:
        """The same; then take the likeliest token of each row, and move positions and step on."""
        self._launch([*self._token(window), self._choice()])

    def _launch(self, launches: Sequence[Launch]) -> None:
        stream = torch.cuda.current_stream(self._buffers.residual.device).cuda_stream
        for number, launch in enumerate(launches):
            # as in the chain of one token, no kernel writes a weight or ends before those before it
            launch.function.launch(
                launch.arguments,
                blocks=launch.blocks,
                columns=launch.columns,
                stream=stream,
                dependent=number > 0,
            )

    def _token(self, window: int) -> list[Launch]:
        b, layers = self._buffers, self._spec.layers
        launches = [
            embedding.launch(
                table=self._spec.embedding.weight,
                tokens=b.tokens,
                lines=b.lines,
                active=b.active,
                residual=b.residual,
                scale=self._scale,
            )
        ]
        for index, layer in enumerate(layers):
            launches += self._layer(index, layer, window)
        return [
            *launches,
            norm.launch(self._after(layers[-1], layers[-1], self._spec.norm), b.x),
            *self._linear(self._spec.head, x=b.x, out=b.logits),
        ]

    def _layer(self, index: int, layer: LayerSpec, window: int) -> list[Launch]:
        b = self._buffers
        previous = self._spec.layers[index - 1] if index else None
        if layer.attention_post_norm is None:
            project = self._linear(
                layer.o, x=b.attended, add=b.residual, out=b.middle, copy=b.residual
            )
            mlp_input, mlp_output = normed(layer, layer.mlp_norm, b.middle), b.residual
        else:
            project = self._linear(layer.o, x=b.attended, out=b.branch, copy=b.sums)
            mlp_input = normed(
                layer,
                layer.mlp_norm,
                b.residual,
                delta=b.branch,
                delta_weight=layer.attention_post_norm,
                total=b.middle,
            )
            mlp_output = b.sums
        return [
            norm.launch(self._after(previous, layer, layer.attention_norm), b.x),
            *self._linear(layer.q, layer.k, layer.v, x=b.x, out=b.qkv),
            self._attention(index, layer, window),
            *project,
            norm.launch(mlp_input, b.x),
            *self._mlp(layer, mlp_output),
        ]

    def _after(self, previous: LayerSpec | None, layer: LayerSpec, weight: Tensor) -> Residual:
        """The norm of the residual streams after a layer; None for the embedding."""
        b = self._buffers
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

    def _linear(
        self,
        *linears: Linear,
        x: Tensor,
        out: Tensor,
        add: Tensor | None = None,
        copy: Tensor | None = None,
    ) -> list[Launch]:
        return linear.launches(
            [_dense(part) for part in linears],
            [part.bias for part in linears],
            x=x,
            out=out,
            add=add,
            copy=copy,
            multiprocessors=self._multiprocessors,
        )

    def _attention(self, index: int, layer: LayerSpec, window: int) -> Launch:
        b = self._buffers
        cosines, sines = self._rotary[layer.rotary]
        keys, values = self._cache[2 * index : 2 * index + 2]
        return attention.launch(
            qkv=b.qkv,
            cosines=cosines,
            sines=sines,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            keys=keys,
            values=values,
            out=b.attended,
            positions=b.positions,
            lines=b.lines,
            active=b.active,
            partials=b.partials,
            counters=b.counters,
            heads=self._spec.heads,
            window=layer.window,
            slots=window,
            scale=layer.scale,
            softcap=layer.softcap,
            epsilon=layer.epsilon,
            weight_offset=layer.weight_offset,
            multiprocessors=self._multiprocessors,
        )

    def _mlp(self, layer: LayerSpec, sums: Tensor) -> list[Launch]:
        part = layer.mlp
        return mlp.launches(
            x=self._buffers.x,
            gate=_dense(part.gate),
            up=_dense(part.up),
            down=_dense(part.down),
            thresholds=part.thresholds,
            activation=part.activation,
            gate_bias=part.gate.bias,
            up_bias=part.up.bias,
            active=self._buffers.active,
            sums=sums,
            counters=None,
            multiprocessors=self._multiprocessors,
        )

    def _choice(self) -> Launch:
        b = self._buffers
        return choice.launch(
            logits=b.logits,
            best=b.best,
            arrived=b.arrived,
            lines=b.lines,
            active=b.active,
            positions=b.positions,
            tokens=b.tokens,
            step=b.step,
            chosen=b.chosen,
            softcap=self._spec.logit_softcap,
        )


def _dense(linear: Linear) -> Tensor:
    if not isinstance(linear.matrix, Dense):
        raise UnsupportedModelError(
            f"kernels of several rows read ordinary weights, not {linear.matrix!r}"
        )
    return linear.weight
