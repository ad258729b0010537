"""Options of ``GenerationConfig`` that no operator of a step does: transformers' code runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from cats.errors import ConfigError

# From token ids [B, T] and scores [B, V] to new scores.
ScoreFunction = Callable[[Tensor, Tensor], Tensor]

# Each with the values that change nothing. None changes nothing for each.
PROCESSED: Mapping[str, tuple[float, ...]] = {
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
    # the last four count only where tokens are drawn
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
DRAWING = frozenset({"typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"})


class Processors:
    """Changes the scores of each step of one generation, as ``model.generate`` would.

    They run operator by operator on the model's device, and read all tokens so far.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Mapping[str, Any],
        *,
        eos_token_ids: tuple[int, ...],
        logits_processor: Iterable[ScoreFunction] = (),
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        sequences: int = 1,
    ) -> None:
        """
        Args:
            model: A model of transformers.
            settings: All that decides about the scores, by its name in ``GenerationConfig``.
            eos_token_ids: Tokens that end a row.
            logits_processor: The user's processors, which run after those of the settings.
            prefix_allowed_tokens_fn: As in ``model.generate``.
            sequences: Continuations per prompt; they are neighbouring rows.

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
        # processors count the rows of a prompt by it; GenerationConfig refuses it where tokens are
        # not drawn, so it is set afterwards
        self._config.num_return_sequences = sequences
        # of GenerationMixin, which a wrapper such as PEFT's passes on
        self._make_processors: Any = model._get_logits_processor
        self._eos_token_ids = eos_token_ids
        self._own_processors = list(logits_processor)
        self._prefix_allowed_tokens_fn = prefix_allowed_tokens_fn
        self._processors: ScoreFunction | None = None
        self._ids = torch.empty(0)

    def begin(self, ids: Tensor, mask: Tensor) -> None:
        """Take the prompts, ``[B, T]``, and their mask, ``[B, T]``, which is False for padding.

        Raises:
            ConfigError: If transformers does not take the settings.
        """
        self._ids = ids
        eos = self._eos_token_ids
        self._config._eos_token_tensor = torch.tensor(eos, device=ids.device) if eos else None
        try:
            self._processors = self._make_processors(
                generation_config=self._config,
                input_ids_seq_length=ids.shape[1],
                prefix_allowed_tokens_fn=self._prefix_allowed_tokens_fn,
                logits_processor=self._own_processors,
                device=ids.device,
                model_kwargs={"attention_mask": None if mask.all() else mask.long()},
            )
        except (RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"transformers does not take these options: {error}") from error

    def scores(self, logits: Tensor) -> Tensor:
        """The scores that the processors make of logits; ``[B, V]``, float32."""
        assert self._processors is not None  # begin() comes first
        # a copy, since some processors write into their argument
        return self._processors(self._ids, logits.to(torch.float32, copy=True))

    def add(self, tokens: Tensor) -> None:
        """Take the chosen tokens, ``[B]``."""
        self._ids = torch.cat([self._ids, tokens[:, None]], dim=1)
