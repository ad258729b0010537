"""The memory through which the launches of a token pass on what they compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cats.decode.stream.spec import ModelSpec
from cats.ops.choice import cuda as choice

_TICKET_STRIDE = 32  # a cache line


@dataclass(frozen=True, slots=True)
class Buffers:
    """Buffers of one chain, float32 where no other dtype stands. Graphs hold their addresses.

    Attributes:
        residual: ``[D]``, the residual stream at the start of a layer.
        middle: ``[D]``, the residual stream between attention and MLP.
        branch: ``[D]``, the output of attention, where a norm follows it.
        sums: ``[D]``, the output of the MLP, where a norm follows it.
        qkv: ``[heads + 2 * key heads, head size]``, flat: queries, keys and values.
        attended: ``[heads * head size]``, in the dtype of the model.
        logits: ``[V]``.
        partials: ``[splits, heads, head size + 2]``, of attention.
        counters: ``[heads]``, int32 zeros, of attention: one per column of its grid, at most.
        tickets: ``[layers + 1, stride]``, int32, of the launches of each layer and of the head.
            The first launch sets them to zero.
        best: ``[2, blocks]``, of the choice.
        arrived: ``[1]``, an int32 zero, of the choice.
    """

    residual: Tensor
    middle: Tensor
    branch: Tensor
    sums: Tensor
    qkv: Tensor
    attended: Tensor
    logits: Tensor
    partials: Tensor
    counters: Tensor
    tickets: Tensor
    best: Tensor
    arrived: Tensor

    @classmethod
    def of(cls, spec: ModelSpec, device: torch.device, *, splits: int) -> Buffers:
        """Buffers for attention with at most ``splits``."""

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        D, query_size = spec.hidden_size, spec.heads * spec.head_size
        return cls(
            residual=floats(D),
            middle=floats(D),
            branch=floats(D),
            sums=floats(D),
            qkv=floats(query_size + 2 * spec.key_heads * spec.head_size),
            attended=torch.zeros(query_size, dtype=spec.dtype, device=device),
            logits=floats(spec.head.matrix.shape[0]),
            partials=floats(splits, spec.heads, spec.head_size + 2),
            counters=integers(spec.heads),
            tickets=integers(len(spec.layers) + 1, _TICKET_STRIDE),
            best=floats(2, choice.BLOCKS),
            arrived=integers(1),
        )
