"""The masks of attention for rows of different lengths, one for each kind of layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cats.errors import UnsupportedModelError
from cats.protocols import ModelConfig

# One for all layers, or one per kind of layer.
Mask = Tensor | dict[str, Tensor]


class Masks:
    """Makes the masks that a model takes as they are, ``[R, 1, 1, slots]``.

    Attributes:
        span: How many tokens sliding layers see; None without such layers.
    """

    def __init__(self, kinds: Sequence[str], config: ModelConfig, dtype: torch.dtype) -> None:
        """
        Args:
            kinds: The kind of each layer.
            config: Of the text part of a model.
            dtype: Of its weights.

        Raises:
            UnsupportedModelError: If its layers or its attention need other masks.
        """
        self._kinds = sorted(set(kinds))
        if others := sorted(set(self._kinds) - {"full_attention", "sliding_attention"}):
            raise UnsupportedModelError(f"it has layers of the kind {', '.join(others)}")
        attention = getattr(config, "_attn_implementation", None)
        if attention not in ("sdpa", "eager"):
            raise UnsupportedModelError(f"masks for attention by {attention} cannot be made")
        self._dtype = dtype if attention == "eager" else None
        self.span: int | None = None
        if "sliding_attention" in self._kinds:
            self.span = getattr(config, "sliding_window", None)
            if self.span is None:
                raise UnsupportedModelError("its sliding layers do not say how far they see")

    def of(self, positions: Tensor, slots: int) -> Mask:
        """Masks for the newest tokens.

        Args:
            positions: Of the newest token of each row, which is also its slot, ``[R, 1]``.
            slots: How many slots attention reads.
        """
        slot = torch.arange(slots, device=positions.device)
        masks = {kind: self._one(kind, positions, slot) for kind in self._kinds}
        return masks[self._kinds[0]] if len(masks) == 1 else masks

    def _one(self, kind: str, positions: Tensor, slot: Tensor) -> Tensor:
        seen = slot <= positions
        if kind == "sliding_attention":
            assert self.span is not None
            seen = seen & (slot > positions - self.span)
        seen = seen[:, None, None, :]
        if self._dtype is None:
            return seen
        lowest = torch.finfo(self._dtype).min
        return torch.zeros(seen.shape, dtype=self._dtype, device=seen.device).masked_fill(
            ~seen, lowest
        )
