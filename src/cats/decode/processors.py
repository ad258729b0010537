"""Options of ``GenerationConfig`` that have no operators here: transformers' own run them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from cats.errors import ConfigError

# Each with the values under which it changes nothing, beside None.
PROCESSED: Mapping[str, tuple[Any, ...]] = {
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "watermarking_config": (),
    # these only where tokens are drawn
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
DRAWING = frozenset({"typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"})


class Processors:
    """Changes the scores of each step of one generation, as ``model.generate`` would.

    They run operator by operator, on the model's device, and read all tokens so far.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Mapping[str, Any],
        *,
        eos_token_ids: tuple[int, ...],
        logits_processor: Any = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        sequences: int = 1,
    ) -> None:
        """
        Args:
            model: Of transformers.
            settings: All that decides about the scores, by its name in ``GenerationConfig``.
            eos_token_ids: Tokens that end a row.
            logits_processor: Processors of the user, which run behind those of the settings.
            prefix_allowed_tokens_fn: As in ``model.generate``.
            sequences: Continuations of each prompt, which are rows beside each other.

        Raises:
            ConfigError: If transformers does not take the settings, or the model cannot generate.
        """
        if not hasattr(model, "_get_logits_processor"):
            raise ConfigError(
                f"{type(model).__name__} has no generate of transformers, which these options need"
            )
        try:
            self._config = GenerationConfig(**settings)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"transformers does not take these options: {error}") from error
        # it would be refused there for greedy decoding; processors count rows of a prompt by it
        self._config.num_return_sequences = sequences
        self._model: Any = model
        self._eos = eos_token_ids
        self._given = list(logits_processor or ())
        self._allowed = prefix_allowed_tokens_fn
        self._all: Any = None
        self._ids = torch.empty(0)

    def begin(self, ids: Tensor, mask: Tensor) -> None:
        """Take the prompts, ``[B, T]``, and where they are no padding.

        Raises:
            ConfigError: If transformers does not take the settings.
        """
        self._ids = ids
        eos = torch.tensor(self._eos, device=ids.device) if self._eos else None
        self._config._eos_token_tensor = eos
        try:
            self._all = self._model._get_logits_processor(
                generation_config=self._config,
                input_ids_seq_length=ids.shape[1],
                prefix_allowed_tokens_fn=self._allowed,
                logits_processor=self._given,
                device=ids.device,
                model_kwargs={"attention_mask": None if mask.all() else mask.long()},
            )
        except (RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"transformers does not take these options: {error}") from error

    def scores(self, logits: Tensor) -> Tensor:
        """What is made of logits, ``[B, V]``; float32."""
        # some processors write into what they get
        scores: Tensor = self._all(self._ids, logits.to(torch.float32, copy=True))
        return scores

    def add(self, tokens: Tensor) -> None:
        """Take what was chosen, ``[B]``."""
        self._ids = torch.cat([self._ids, tokens[:, None]], dim=1)
