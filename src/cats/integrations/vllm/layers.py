"""One sparse MLP of vLLM as one call of ``cats::gated_mlp``, over the weights that vLLM loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from cats import ops  # noqa: F401 (defines the operator)
from cats.integrations.vllm.mlps import StackedMLP, is_plain


class KeptWeights(UnquantizedLinearMethod):  # type: ignore[misc]
    """vLLM's method for dense weights, with the weights in memory as our kernels read them.

    vLLM's CPU build would pack them and drop the tensor.
    """

    def __init__(self, *, by_column: bool) -> None:
        super().__init__()
        self._by_column = by_column

    def process_weights_after_loading(self, layer: Any) -> None:
        if self._by_column:
            # one column, the weights of a neuron, becomes contiguous; the shape stays
            layer.weight.data = layer.weight.data.t().contiguous().t()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, layer.weight, bias)


def can_fuse(mlp: StackedMLP) -> bool:
    """Whether the operator computes what the MLP computes, and its weights are plain numbers."""
    gate_up, down = mlp.child(mlp.gate_up), mlp.child(mlp.down)
    return (
        all(type(layer.quant_method) is UnquantizedLinearMethod for layer in (gate_up, down))
        and not gate_up.skip_bias_add
        and not down.skip_bias_add
        and down.input_is_parallel
        and is_plain(mlp)
    )


class FusedStackedMLP(nn.Module):
    """A sparse MLP that runs as one operator, in the place of vLLM's module.

    ``cats::gated_mlp`` chooses for each batch: kernels that skip rows for few tokens, dense
    products above. A compiler sees one operator for all batches, since vLLM drops its guards on
    the number of tokens.
    """

    def __init__(self, mlp: StackedMLP) -> None:
        super().__init__()
        # the same dictionary: weights keep their names, and a child that is replaced is replaced
        self._modules = mlp.module._modules
        self._gate_up, self._act, self._down = mlp.gate_up, mlp.act, mlp.down
        self._returns_sum = mlp.child(mlp.down).reduce_results and mlp.ranks > 1
        self._adds_bias = mlp.rank == 0
        mlp.child(mlp.gate_up).quant_method = KeptWeights(by_column=False)
        mlp.child(mlp.down).quant_method = KeptWeights(by_column=True)

    def forward(self, x: Tensor) -> Tensor:
        gate_up, down = getattr(self, self._gate_up), getattr(self, self._down)
        act = getattr(self, self._act)
        gate, up = gate_up.weight.chunk(2)
        gate_bias, up_bias = (None, None) if gate_up.bias is None else gate_up.bias.chunk(2)
        out: Tensor = torch.ops.cats.gated_mlp(
            x.reshape(-1, x.shape[-1]).contiguous(),
            gate,
            up,
            down.weight,
            act.threshold,
            act.activation,
            act.router,
            gate_bias,
            up_bias,
            # each process holds the whole bias, and the sum has it once
            down.bias if self._adds_bias else None,
            act.product_threshold,
            "auto",
        )
        out = out.view(*x.shape[:-1], -1)
        return tensor_model_parallel_all_reduce(out) if self._returns_sum else out
