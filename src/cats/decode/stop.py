"""What ends a row besides its end tokens and its length; all of it runs on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from cats.decode.options import Options
from cats.decode.text import Detokenizer
from cats.errors import ConfigError
from cats.protocols import Tokenizer

# Of transformers: from token ids [B, T] and scores to which rows have ended, [B].
Criterion = Callable[..., Tensor]


class Stop(Protocol):
    def add(self, tokens: Tensor) -> Tensor:
        """Take one token per row, ``[B]``; returns which rows have ended, ``[B]``, bool."""


def stops_of(
    options: Options, tokenizer: Tokenizer | None, ids: Tensor, mask: Tensor
) -> list[Stop]:
    """What to ask after each step.

    Args:
        options: Stop strings, criteria, and the time limit, which begins now.
        tokenizer: Needed for stop strings.
        ids: The prompts, ``[B, T]``.
        mask: False where they are padding, ``[B, T]``.

    Raises:
        ConfigError: If stop strings have no tokenizer, or a criterion is one that options replace.
    """
    criteria = list(options.stopping_criteria)
    for criterion in criteria:
        # in transformers these replace the limits of the call, even those that it sets itself
        if type(criterion) in (EosTokenCriteria, MaxLengthCriteria):
            raise ConfigError(
                f"{type(criterion).__name__} cannot be used as a stopping criterion: give "
                "eos_token_id, max_length or max_new_tokens instead"
            )
    if options.max_time is not None and not _holds(criteria, MaxTimeCriteria):
        criteria.append(MaxTimeCriteria(options.max_time))
    stops: list[Stop] = [Criteria(criteria, ids)] if criteria else []
    if options.stop_strings and not _holds(criteria, StopStringCriteria):
        prompts = [row[is_token].tolist() for row, is_token in zip(ids, mask, strict=True)]
        stops.append(StopStrings(options.stop_strings, tokenizer, prompts))
    return stops


class StopStrings:
    """Looks for one of several strings in the new text of each row.

    The new text is what follows the text of the prompt. It includes special tokens, and the space
    that it may begin with.
    """

    def __init__(
        self, strings: tuple[str, ...], tokenizer: Tokenizer | None, prompts: list[list[int]]
    ) -> None:
        """
        Args:
            strings: Any of these ends a row.
            tokenizer: Makes text of tokens.
            prompts: Token ids of each row's prompt.

        Raises:
            ConfigError: If there is no tokenizer.
        """
        if tokenizer is None:
            raise ConfigError("stop_strings need the tokenizer: pass tokenizer=...")
        self._strings = strings
        self._rows = [Detokenizer(tokenizer, prompt=prompt) for prompt in prompts]
        # the last characters of each row's text, one fewer than the longest string has
        self._tails = [""] * len(prompts)
        self._tail_length = max(map(len, strings)) - 1
        self._ended = [False] * len(prompts)

    def add(self, tokens: Tensor) -> Tensor:
        for row, token in enumerate(tokens.tolist()):
            if self._ended[row]:
                continue
            certain = self._tails[row] + self._rows[row].add([token])
            text = certain + self._rows[row].pending
            self._ended[row] = any(string in text for string in self._strings)
            self._tails[row] = certain[max(len(certain) - self._tail_length, 0) :]
        return torch.tensor(self._ended)


class Criteria:
    """Asks criteria of transformers, which get all tokens so far and no scores."""

    def __init__(self, criteria: Sequence[Criterion], ids: Tensor) -> None:
        self._criteria = StoppingCriteriaList(criteria)
        self._ids = ids

    def add(self, tokens: Tensor) -> Tensor:
        self._ids = torch.cat([self._ids, tokens[:, None].to(self._ids.device)], dim=1)
        ended: Tensor = self._criteria(self._ids, None)
        return ended.cpu()


def _holds(criteria: Sequence[Criterion], kind: type) -> bool:
    return any(type(criterion) is kind for criterion in criteria)
