"""One token of a conversation on a CPU: a description of the model and the buffers, run in C++."""

from __future__ import annotations

from weakref import proxy

import torch
from torch import Tensor

from cats.decode.state import State
from cats.decode.stream.packed import packed_rows
from cats.decode.stream.rotary import RotaryTables
from cats.decode.stream.spec import LayerSpec, ModelSpec
from cats.functional import ACTIVATIONS
from cats.model import Linear
from cats.ops.quantised import SCALE_CODES, PackedColumns
from cats.ops.step import Plan
from cats.ops.step.description import (
    StepColumns,
    StepLayer,
    StepMatrix,
    StepModel,
    address,
    columns,
    matrix,
)
from cats.weights import Packed

# In the order of ``enum class Activation`` of gated_mlp.h.
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
assert set(_ACTIVATIONS) == set(ACTIVATIONS)


class CpuChain:
    """All parts of a token at one capacity of the cache; see :class:`.chain.Chain` for a GPU."""

    def __init__(self, spec: ModelSpec, state: State, embedding_scale: float = 1.0) -> None:
        """
        Args:
            spec: The model.
            state: A conversation of one row, after its first pass. Steps read and write its
                buffers.
            embedding_scale: Multiplies the embedding.
        """
        # these weights stay in memory even if the model gets new ones
        spec = spec.detached()
        # the state holds this chain: in a cycle, both would stay until the garbage collector runs
        self._spec, self._state = spec, proxy(state)
        self._rotary = RotaryTables(spec, state.capacity)
        self._logits = torch.zeros(spec.head.matrix.shape[0])
        kept = [self._logits, state.tokens, state.positions, state.slots, state.step]
        kept += [state.chosen, state.finished, state.eos, *state.cache.buffers()]
        layers = [self._layer(index, layer, state) for index, layer in enumerate(spec.layers)]
        last = spec.layers[-1]
        model = StepModel(
            embedding=_matrix(spec.embedding),
            head=_matrix(spec.head),
            norm=address(spec.norm),
            logits=address(self._logits),
            token=address(state.tokens),
            position=address(state.positions),
            slot=address(state.slots),
            step=address(state.step),
            chosen=address(state.chosen),
            finished=address(state.finished),
            ends=address(state.eos),
            end_count=len(state.eos),
            number=SCALE_CODES[spec.dtype],
            hidden=spec.hidden_size,
            neurons=max(len(layer.mlp.thresholds) for layer in spec.layers),
            heads=spec.heads,
            key_heads=spec.key_heads,
            head_size=spec.head_size,
            capacity=state.capacity,
            vocabulary=spec.embedding.matrix.shape[0],
            embedding_scale=embedding_scale,
            epsilon=last.epsilon,
            weight_offset=last.weight_offset,
        )
        self._plan = Plan(model, layers, (spec, self._rotary, kept))

    def use_frequencies_of(self, length: int) -> None:
        """Rotate positions as the model does in a pass over ``length`` tokens."""
        self._rotary.use_frequencies_of(length)

    def settle(self) -> None:
        """Wait until no thread reads the cache for an earlier token."""
        self._plan.settle()

    def run(self, window: int) -> Tensor:
        """Run the newest token; returns logits ``[V]``, float32.

        Args:
            window: Of a GPU's kernels; the slot of the newest token says what is read here.
        """
        self._plan.run()
        if softcap := self._spec.logit_softcap:
            return softcap * (self._logits / softcap).tanh()
        return self._logits

    def run_greedily(self, padding: int) -> None:
        """Run the newest token, take the likeliest next one, and count slot, position and step on.

        Args:
            padding: The token of a row that has ended.
        """
        self._plan.run_and_choose(padding)

    def run_layer(self, index: int, x: Tensor, window: int) -> Tensor:
        """The output of one layer for an input ``[D]``, float32; both are the residual stream."""
        layer = self._spec.layers[index]
        middle, added = self._plan.run_layer(index, x)
        if layer.mlp_post_norm is None:
            return middle + added
        norm = added * torch.rsqrt(added.square().mean() + layer.epsilon)
        return middle + norm * (layer.mlp_post_norm.float() + layer.weight_offset)

    def _layer(self, index: int, layer: LayerSpec, state: State) -> StepLayer:
        keys, values = state.cache.slot_layers[index].keys, state.cache.slot_layers[index].values
        cosines, sines = self._rotary[layer.rotary]
        mlp = layer.mlp
        return StepLayer(
            **{name: _matrix(getattr(layer, name)) for name in ("q", "k", "v", "o")},
            gate=_matrix(mlp.gate),
            up=_matrix(mlp.up),
            down=_columns(mlp.down),
            attention_norm=address(layer.attention_norm),
            attention_post_norm=address(layer.attention_post_norm),
            mlp_norm=address(layer.mlp_norm),
            mlp_post_norm=address(layer.mlp_post_norm),
            q_norm=address(layer.q_norm),
            k_norm=address(layer.k_norm),
            thresholds=address(mlp.thresholds),
            product_thresholds=address(mlp.product_thresholds),
            cosines=address(cosines),
            sines=address(sines),
            keys=address(keys),
            values=address(values),
            activation=_ACTIVATIONS.index(mlp.activation),
            gate_is_router=mlp.router == "gate",
            window=layer.window,
            rotated=cosines.shape[1],
            scale=layer.scale,
            softcap=layer.softcap,
            epsilon=layer.epsilon,
            weight_offset=layer.weight_offset,
        )


def _matrix(linear: Linear) -> StepMatrix:
    return matrix(packed_rows(linear) or linear.weight, linear.bias)


def _columns(linear: Linear) -> StepColumns:
    if isinstance(linear.matrix, Packed):
        assert isinstance(linear.matrix.matrix, PackedColumns)
        return columns(linear.matrix.matrix)
    return columns(linear.weight)
