"""The baseline of 4 bits: torch's own operator for int4 weights, as gpt-fast and torchao use it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from cats.errors import BackendError
from cats.weights import Quantised, QuantisedLinear
from cats.weights.quantised import packed, unpacked

_INNER_TILES = 8


class TorchInt4Linear(nn.Module):
    """A linear layer by ``torch.ops.aten._weight_int4pack_mm``; bfloat16 on a GPU."""

    weight: Tensor
    tables: Tensor

    def __init__(self, matrix: Quantised, bias: Tensor | None) -> None:
        """
        Raises:
            BackendError: If torch's operator does not take the matrix.
        """
        super().__init__()
        groups_fit = matrix.group_size in (32, 64, 128, 256) and not matrix.columns % 128
        if matrix.bits != 4 or matrix.zero != 8 or matrix.zeros is not None or not groups_fit:
            raise BackendError(f"torch's int4 operator does not take {matrix!r}")
        codes = unpacked(matrix.codes, 4, matrix.columns)
        # its first column is in the upper half of a byte
        swapped = packed(codes.view(len(codes), -1, 2).flip(2).flatten(1))
        self.register_buffer(
            "weight", torch.ops.aten._convert_weight_to_int4pack(swapped, _INNER_TILES)
        )
        scales = matrix.scales.to(torch.bfloat16).t()
        self.register_buffer(
            "tables", torch.stack([scales, torch.zeros_like(scales)], 2).contiguous()
        )
        self.group_size, self.bias = matrix.group_size, bias

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.aten._weight_int4pack_mm(
            x.flatten(0, -2), self.weight, self.group_size, self.tables
        )
        product = product.unflatten(0, x.shape[:-1])
        return product if self.bias is None else product + self.bias


def with_torch_int4(model: nn.Module) -> nn.Module:
    """A copy of a model of int4 weights that runs them by torch's operator; it shares all else.

    Raises:
        BackendError: If torch's operator does not take them.
    """
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    result = copy.deepcopy(model, shared)
    for name, layer in list(result.named_modules()):
        if isinstance(layer, QuantisedLinear):
            result.set_submodule(name, TorchInt4Linear(layer.matrix, layer.bias))
    return result
