"""One call's prompts and options, checked, in the form that a session runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cats.decode.extras import extras_of
from cats.decode.inputs import Prompts, batch_of
from cats.decode.options import Options, padding, resolve
from cats.decode.rotary import LengthRule
from cats.errors import ConfigError
from cats.protocols import ModelConfig, Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is to be continued, and how.

    Attributes:
        ids: Token ids ``[B, T]``, int64, on the device of the caller's inputs.
        mask: False where they are padding, ``[B, T]``, bool.
        options: How tokens are chosen, and what ends a row.
        extras: What the model takes of a prompt beside ids and mask, such as ``pixel_values``.
        tokenizer: Makes text of the new tokens, for stop strings.
    """

    ids: Tensor
    mask: Tensor
    options: Options
    extras: Mapping[str, Any]
    tokenizer: Tokenizer | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        config: ModelConfig,
        inputs: Prompts,
        attention_mask: Tensor | None,
        options: Mapping[str, Any],
        tokenizer: Tokenizer | None = None,
    ) -> Request:
        """Check the arguments of a call; see :func:`cats.generate`.

        Args:
            model: A Hugging Face causal model.
            config: The configuration of its text part.
            inputs: Prompts in any form.
            attention_mask: Of ids ``[B, T]``.
            options: By the names of ``GenerationConfig``.
            tokenizer: Makes ids of texts.

        Raises:
            ConfigError: If an option is unknown or out of range, or the text does not fit the
                context.
            DataError: If the prompts are no token ids of the model, or the mask does not fit them.
        """
        pad, infer_mask = padding(model, options)
        ids, mask = batch_of(
            inputs,
            attention_mask,
            pad_token_id=pad,
            vocabulary=config.vocab_size,
            infer_mask=infer_mask,
            tokenizer=tokenizer,
        )
        extras = extras_of(inputs, model)
        resolved = resolve(model, ids.shape[1], options)
        if resolved.num_return_sequences > 1:
            if extras:
                raise ConfigError(
                    f"num_return_sequences cannot be used with {', '.join(extras)}: repeat the rows"
                )
            ids, mask = (t.repeat_interleave(resolved.num_return_sequences, 0) for t in (ids, mask))
        _check_context(config, ids.shape[1], resolved.max_new_tokens)
        return cls(ids=ids, mask=mask, options=resolved, extras=extras, tokenizer=tokenizer)

    @property
    def length(self) -> int:
        """Tokens of the prompt, padding included."""
        return self.ids.shape[1]


def _check_context(config: ModelConfig, prompt: int, new: int) -> None:
    rule = LengthRule.of(config)
    context = getattr(config, "max_position_embeddings", None) if rule is None else rule.limit
    # some models say -1 for any length
    if context is not None and 0 < context < prompt + new:
        raise ConfigError(
            f"the prompt has {prompt} tokens and {new} new ones were asked for, but the model's "
            f"context is {context}: shorten one of them"
        )
