"""The memory through which the launches of a step of several rows pass on what they compute."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cats.decode.stream.spec import ModelSpec
from cats.ops.attention import rows as attention
from cats.ops.choice import rows as choice

# Steps whose choices are kept: more than the host may be behind.
_STEPS = 8


@dataclass(frozen=True, slots=True)
class RowBuffers:
    """What the launches of up to ``R`` rows read, pass on and write, float32 where no other dtype
    stands. Graphs hold their addresses, and chains of fewer rows use the first ones.

    Attributes:
        places: What the host says of the rows of a step, in one piece: ``lines``, ``positions`` and
            ``active`` are views of it.
        lines: ``[R]``, int64: the line of each row.
        positions: ``[R]``, int64: position and slot of its newest token.
        active: ``[R]``, int32: 0 where a row is not used.
        tokens: ``[lines]``, int64: the newest token of each line.
        step: ``[1]``, int64: the number of the next step.
        chosen: ``[steps, R]``, int64: the choices of the last steps, in turn.
        residual: ``[R, D]``, the residual streams at the start of a layer.
        middle: ``[R, D]``, the residual streams between attention and MLP.
        branch: ``[R, D]``, the output of attention, where a norm follows it.
        sums: ``[R, D]``, the output of the MLP, where a norm follows it.
        x: ``[R, D]``, the norm of the residual streams, in the dtype of the model.
        qkv: ``[R, (heads + 2 * key heads) * head size]``.
        attended: ``[R, heads * head size]``, in the dtype of the model.
        logits: ``[R, V]``.
        partials: Of attention.
        counters: int32 zeros, of attention.
        best: ``[2, R * blocks]``, of the choice.
        arrived: ``[R + 1]``, int32 zeros, of the choice.
    """

    places: Tensor
    lines: Tensor
    positions: Tensor
    active: Tensor
    tokens: Tensor
    step: Tensor
    chosen: Tensor
    residual: Tensor
    middle: Tensor
    branch: Tensor
    sums: Tensor
    x: Tensor
    qkv: Tensor
    attended: Tensor
    logits: Tensor
    partials: Tensor
    counters: Tensor
    best: Tensor
    arrived: Tensor

    @classmethod
    def of(
        cls, spec: ModelSpec, rows: int, tokens: Tensor, *, capacity: int, multiprocessors: int
    ) -> RowBuffers:
        """Buffers for up to ``rows`` rows, over lines of ``capacity`` slots."""
        device = tokens.device

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        D, query_size = spec.hidden_size, spec.heads * spec.head_size
        partials = 0
        for count in range(1, rows + 1):
            grid = attention.grid_of(count, capacity, spec.heads, spec.key_heads, multiprocessors)
            partials = max(partials, count * grid.splits)
        places = integers(places_size(rows))
        lines, positions, active = split_places(places, rows)
        return cls(
            places=places,
            lines=lines,
            positions=positions,
            active=active,
            tokens=tokens,
            step=integers(1),
            chosen=integers(_STEPS, rows),
            residual=floats(rows, D),
            middle=floats(rows, D),
            branch=floats(rows, D),
            sums=floats(rows, D),
            x=torch.zeros(rows, D, dtype=spec.dtype, device=device),
            qkv=floats(rows, query_size + 2 * spec.key_heads * spec.head_size),
            attended=torch.zeros(rows, query_size, dtype=spec.dtype, device=device),
            logits=floats(rows, spec.head.matrix.shape[0]),
            partials=floats(partials * spec.heads * (spec.head_size + 2)),
            counters=torch.zeros(rows * spec.heads, dtype=torch.int32, device=device),
            best=floats(2, rows * choice.BLOCKS),
            arrived=torch.zeros(rows + 1, dtype=torch.int32, device=device),
        )

    def first(self, rows: int) -> RowBuffers:
        """The buffers of the first rows."""
        per_row = (
            "lines",
            "positions",
            "active",
            "residual",
            "middle",
            "branch",
            "sums",
            "x",
            "qkv",
            "attended",
            "logits",
        )
        return replace(self, **{name: getattr(self, name)[:rows] for name in per_row})


def places_size(rows: int) -> int:
    """How many int64 hold what the host says of the rows of a step."""
    return 2 * rows + -(-rows // 2)


def split_places(places: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the lines, the positions, and of which rows are active."""
    return places[:rows], places[rows : 2 * rows], places[2 * rows :].view(torch.int32)[:rows]
