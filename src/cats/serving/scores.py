"""Changes of a session's scores that OpenAI's API defines, as logits processors of transformers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Penalties:
    """Takes ``presence + frequency * count`` off the score of each token that was generated.

    Tokens of the prompt do not count: OpenAI's documents speak of tokens that were sampled before.
    """

    def __init__(self, *, presence: float, frequency: float, prompt_length: int) -> None:
        self._presence, self._frequency = presence, frequency
        self._taken = prompt_length
        self._counts: Tensor | None = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """
        Args:
            ids: ``[1, T]``, the prompt and all new tokens.
            scores: ``[1, V]``.
        """
        if self._counts is None:
            self._counts = torch.zeros_like(scores)
        new = ids[:, self._taken :]
        self._taken = ids.shape[1]
        self._counts.scatter_add_(1, new, torch.ones_like(new, dtype=scores.dtype))
        counts = self._counts
        return scores - self._presence * (counts > 0).to(scores.dtype) - self._frequency * counts


class Bias:
    """Adds a number to the scores of some tokens."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._tokens, self._values = list(biases), list(biases.values())

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """See :class:`Penalties`."""
        tokens = torch.tensor(self._tokens, device=scores.device)
        values = torch.tensor(self._values, device=scores.device, dtype=scores.dtype)
        return scores.index_add(1, tokens, values[None])
