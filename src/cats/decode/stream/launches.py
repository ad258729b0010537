"""The launches of the parts of a token: which kernel runs, and with which of the buffers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cats.decode.state import State
from cats.decode.stream.buffers import Buffers
from cats.decode.stream.packed import packed_matrices, packed_rows, runs_of_layout
from cats.decode.stream.rotary import RotaryTables
from cats.decode.stream.spec import LayerSpec, ModelSpec
from cats.model import Linear
from cats.ops.attention import cuda as attention
from cats.ops.choice import cuda as choice
from cats.ops.cuda.arguments import address
from cats.ops.cuda.function import Launch
from cats.ops.cuda.residual import Residual
from cats.ops.embedding import cuda as embedding
from cats.ops.linear import cuda as linear
from cats.ops.linear import quantised as quantised_linear
from cats.ops.mlp.cuda import quantised as quantised_mlp
from cats.ops.mlp.cuda import residual as dense_mlp


@dataclass(frozen=True, kw_only=True, slots=True)
class Launches:
    """Makes launches for one conversation.

    Attributes:
        spec: The model, its quantised matrices packed.
        state: The conversation.
        buffers: What the launches pass on to each other.
        rotary: Cosines and sines of each position.
        multiprocessors: Of the GPU.
        traced: Whether warps write times.
    """

    spec: ModelSpec
    state: State
    buffers: Buffers
    rotary: RotaryTables
    multiprocessors: int
    traced: bool

    def embedding(self, scale: float) -> Launch:
        """The embedding of the newest token, times ``scale``, starts the residual stream."""
        return embedding.launch(
            table=self.spec.embedding.weight,
            token=self.state.tokens,
            residual=self.buffers.residual,
            counters=self.buffers.tickets,
            scale=scale,
            traced=self.traced,
        )

    def linear(
        self,
        *linears: Linear,
        x: Tensor | Residual,
        out: Tensor,
        tickets: Tensor,
        add: Tensor | None = None,
        copy: Tensor | None = None,
        early: bool = True,
    ) -> list[Launch]:
        """``out = add + concatenated(matrix @ x + bias)``.

        Args:
            linears: Dense, or packed in any layout: one launch for each run of the same layout.
            x: The input.
            out: ``[all rows]``, float32.
            tickets: int32, zero when the launches start: one for each launch.
            add: The same shape and dtype as ``out``.
            copy: The same shape and dtype; also gets the output, or 0 where there is no ``add``.
            early: Whether weights may be requested before the kernel before this one has ended.
        """
        launches, start = [], 0
        for number, run in enumerate(runs_of_layout(linears)):
            rows = slice(start, start + sum(part.matrix.shape[0] for part in run))
            start = rows.stop
            launches.append(
                self._linear_of_one_layout(
                    run,
                    x=x,
                    out=out[rows],
                    add=None if add is None else add[rows],
                    copy=None if copy is None else copy[rows],
                    counter=tickets[number : number + 1],
                    early=early,
                )
            )
        return launches

    def _linear_of_one_layout(
        self,
        linears: tuple[Linear, ...],
        *,
        x: Tensor | Residual,
        out: Tensor,
        add: Tensor | None,
        copy: Tensor | None,
        counter: Tensor,
        early: bool,
    ) -> Launch:
        biases = [part.bias for part in linears]
        rows = [packed for part in linears if (packed := packed_rows(part)) is not None]
        if rows:
            return quantised_linear.launch(
                rows,
                biases,
                x=x,
                dtype=self.spec.dtype,
                out=out,
                add=add,
                copy=copy,
                counter=counter,
                early=early,
                multiprocessors=self.multiprocessors,
                traced=self.traced,
            )
        return linear.launch(
            [part.weight for part in linears],
            biases,
            x=x,
            out=out,
            add=add,
            copy=copy,
            early=early,
            multiprocessors=self.multiprocessors,
            traced=self.traced,
        )

    def attention(self, index: int, layer: LayerSpec, window: int) -> Launch:
        """Attention of layer ``index`` to the first ``window`` slots."""
        cosines, sines = self.rotary[layer.rotary]
        keys, values = self.state.cache.buffers()[2 * index : 2 * index + 2]
        return attention.launch(
            qkv=self.buffers.qkv,
            cosines=cosines,
            sines=sines,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            keys=keys,
            values=values,
            out=self.buffers.attended,
            slot=self.state.slots,
            position=self.state.positions,
            partials=self.buffers.partials,
            counters=self.buffers.counters,
            heads=self.spec.heads,
            window=layer.window,
            slots=window,
            scale=layer.scale,
            softcap=layer.softcap,
            epsilon=layer.epsilon,
            weight_offset=layer.weight_offset,
            multiprocessors=self.multiprocessors,
            traced=self.traced,
        )

    def mlp(self, layer: LayerSpec, x: Residual, *, sums: Tensor, tickets: Tensor) -> Launch:
        """``sums += MLP(x)``; dense launches take tickets from the start of ``tickets``."""
        mlp = layer.mlp
        if matrices := packed_matrices(mlp):
            gate, up, down = matrices
            return quantised_mlp.launch(
                x=x,
                gate=gate,
                up=up,
                down=down,
                thresholds=mlp.thresholds,
                activation=mlp.activation,
                gate_bias=mlp.gate.bias,
                up_bias=mlp.up.bias,
                dtype=self.spec.dtype,
                sums=sums,
                multiprocessors=self.multiprocessors,
                traced=self.traced,
            )
        return dense_mlp.launch(
            x=x,
            gate=mlp.gate.weight,
            up=mlp.up.weight,
            down=mlp.down.weight,
            thresholds=mlp.thresholds,
            activation=mlp.activation,
            gate_bias=mlp.gate.bias,
            up_bias=mlp.up.bias,
            sums=sums,
            counters=tickets,
            multiprocessors=self.multiprocessors,
            traced=self.traced,
        )

    def choice(self, padding: int) -> Launch:
        """Take the likeliest token, and count slot, position and step on."""
        state = self.state
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
            softcap=self.spec.logit_softcap,
            traced=self.traced,
        )


def normed(
    layer: LayerSpec,
    weight: Tensor,
    base: Tensor,
    *,
    delta: Tensor | None = None,
    delta_weight: Tensor | None = None,
    total: Tensor | None = None,
) -> Residual:
    """The norm of the residual stream, as an input of a launch.

    Args:
        layer: Says how its norms are computed.
        weight: Of the norm, ``[D]``.
        base: The residual stream, ``[D]``.
        delta: Its norm, with ``delta_weight``, is added to ``base`` first.
        delta_weight: ``[D]``.
        total: Gets that sum.
    """
    return Residual(
        base=address(base),
        delta=address(delta),
        delta_weight=address(delta_weight),
        sum=address(total),
        weight=address(weight),
        epsilon=layer.epsilon,
        weight_offset=layer.weight_offset,
    )
