"""Log probabilities of the chosen tokens and of the likeliest ones beside them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """What the model's logits say about one new token, before any option changes them.

    Attributes:
        chosen: Log probability of the token itself.
        top: The likeliest tokens and their log probabilities, in falling order.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


class LogprobRecorder:
    """Keeps the log probabilities of each chosen token on the device until the host asks."""

    def __init__(self, count: int) -> None:
        """
        Args:
            count: How many of the likeliest tokens are kept for each token.
        """
        self._count = count
        self._waiting: deque[tuple[Tensor, Tensor, Tensor]] = deque()

    def add(self, logits: Tensor, token: Tensor) -> None:
        """Take logits ``[1, V]`` and the token ``[1]`` that was chosen."""
        logprobs = logits[0].float().log_softmax(-1)
        top = logprobs.topk(min(self._count, len(logprobs)))
        self._waiting.append((logprobs[token[0]], top.values, top.indices))

    def take(self) -> TokenLogprobs:
        """Those of the oldest token that was not taken yet."""
        chosen, values, tokens = self._waiting.popleft()
        # -inf is no number in JSON, and NaN has no order; the model's users see the least float32
        least = torch.finfo(torch.float32).min
        pairs = zip(tokens.tolist(), values.clamp(min=least).tolist(), strict=True)
        return TokenLogprobs(chosen=float(chosen.clamp(min=least)), top=tuple(pairs))
