"""Whether the steps of an engine compute what the model's modules compute."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, TypedDict, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cats.decode import Decoder
from cats.decode.forward import cache_argument
from cats.metrics import realized_sparsity
from cats.protocols import CausalModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class CheckFields(TypedDict, total=False):
    """Fields of :class:`cats.results.TokenTime`."""

    kl: float
    kl_of_rounding: float
    same_choice: float
    sparsity_error: float


@dataclass(frozen=True, slots=True)
class ModuleCheck:
    """What the engines must agree with: the modules on the exact path, given the same tokens.

    At its thresholds, a sparse model turns a rounding error into a neuron. So even the modules
    differ from themselves if they run token by token instead of in one pass.

    Attributes:
        log_probabilities: Those after each token that follows the prompt, ``[B, N, V]``, float32,
            of one pass.
        rounding: Divergence from them of the modules that run token by token.
        dropped: Realised sparsity, mean over the MLPs.
    """

    log_probabilities: Tensor
    rounding: float
    dropped: float

    @classmethod
    def run(cls, model: nn.Module, text: Tensor, prompt_length: int) -> ModuleCheck:
        """Run the modules of a model that is not fused on ``[B, T]`` tokens."""
        causal = cast(CausalModel, model)
        with torch.inference_mode():
            exact = causal(input_ids=text, use_cache=False).logits[:, prompt_length:]
            exact = exact.float().log_softmax(-1)
            cache = DynamicCache(config=cast("PreTrainedConfig", causal.config))
            cached = {cache_argument(model): cache, "use_cache": True}
            causal(input_ids=text[:, :prompt_length], **cached)
            tokens = text[:, prompt_length:].split(1, dim=1)
            logits = [causal(input_ids=token, **cached).logits for token in tokens]
        rounding = divergence(exact, torch.cat(logits, dim=1))
        return cls(exact, rounding, _mean_sparsity(model, text))

    def compare(self, decoder: Decoder, text: Tensor) -> CheckFields:
        """How far the steps of a decoder, and what its MLPs drop, are from the modules."""
        exact = self.log_probabilities
        logits = decoder.logits(text, prompt_length=text.shape[1] - exact.shape[1])
        return {
            "kl": divergence(exact, logits),
            "kl_of_rounding": self.rounding,
            "same_choice": float((exact.argmax(-1) == logits.argmax(-1)).float().mean()),
            "sparsity_error": _mean_sparsity(decoder.model, text) - self.dropped,
        }


def divergence(exact: Tensor, logits: Tensor) -> float:
    """Mean KL divergence, in nats, of logits ``[B, N, V]`` from exact log-probabilities."""
    actual = logits.float().log_softmax(-1)
    # below zero by rounding alone; NaN stays
    return float((exact.exp() * (exact - actual)).sum(-1).mean().clamp(min=0))


def _mean_sparsity(model: nn.Module, text: Tensor) -> float:
    """Realised sparsity on ``[B, T]`` tokens, mean over the MLPs; 0 for a dense model."""
    if not getattr(model.config, "cats", None):
        return 0.0
    return fmean(realized_sparsity(model, [text]).values())
