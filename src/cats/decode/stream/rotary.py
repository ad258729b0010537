"""The angles of a model's rotary embedding, as tables that launches read."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from cats.decode.stream.spec import ModelSpec


class RotaryTables:
    """Cosines and sines of each kind of layer, in buffers whose addresses do not change."""

    def __init__(self, spec: ModelSpec, capacity: int) -> None:
        """
        Args:
            spec: The model.
            capacity: Positions of the tables.
        """
        self._spec, self._capacity = spec, capacity
        self._frequencies: int | None = None
        self._tables: dict[str, tuple[Tensor, Tensor]] = {}
        self.use_frequencies_of(1)

    def __getitem__(self, kind: str) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a kind of layer, ``[capacity, R]``, float32."""
        return self._tables[kind]

    def use_frequencies_of(self, length: int) -> None:
        """Rotate positions as the model does in a pass over ``length`` tokens."""
        rule = self._spec.length_rule
        frequencies = 0 if rule is None else rule.range_of(length)
        if frequencies == self._frequencies:
            return
        # a model chooses its frequencies by the largest position of a pass
        slots = self._capacity
        if rule is not None and not frequencies:
            slots = min(slots, rule.original)
        for kind in {layer.rotary for layer in self._spec.layers}:
            tables = _rotary_table(self._spec, kind, slots)
            if kind not in self._tables:
                empty = [t.new_zeros(self._capacity, t.shape[1]) for t in tables]
                self._tables[kind] = empty[0], empty[1]
            for table, new in zip(self._tables[kind], tables, strict=True):
                table[:slots] = new
        self._frequencies = frequencies


def _rotary_table(spec: ModelSpec, kind: str, slots: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, ``[slots, R]``, float32, as the model's own module computes them."""
    rotary = spec.base.get_submodule("rotary_emb")
    positions = torch.arange(slots, device=spec.norm.device)[None]
    like = torch.zeros(1, 1, 1, device=spec.norm.device)
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        cosines, sines = rotary(like, positions, kind)
    else:
        cosines, sines = rotary(like, positions)
    return cosines[0].contiguous(), sines[0].contiguous()
