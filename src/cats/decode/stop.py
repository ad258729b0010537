"""What ends a row beside its tokens, looked for on the host."""

from __future__ import annotations

from typing import Any, Protocol

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


class Stop(Protocol):
    def add(self, tokens: Tensor) -> Tensor:
        """Take a token of each row, ``[B]``; returns which rows have ended, ``[B]``, bool."""


def stops_of(options: Options, tokenizer: Any, ids: Tensor, mask: Tensor) -> list[Stop]:
    """What to ask after each step.

    Args:
        options: Stop strings, criteria, and the most time to take, which begins now.
        tokenizer: Needed for stop strings.
        ids: The prompts, ``[B, T]``.
        mask: Where they are no padding, ``[B, T]``.

    Raises:
        ConfigError: If stop strings have no tokenizer, or a criterion would take the place of
            something that ends a row here.
    """
    criteria = list(options.stopping_criteria)
    for given in criteria:
        # in transformers they replace the limits of the call, those it was given included
        if type(given) in (EosTokenCriteria, MaxLengthCriteria):
            raise ConfigError(
                f"{type(given).__name__} is not taken as a stopping criterion: give eos_token_id, "
                "max_length or max_new_tokens instead"
            )
    if options.max_time is not None and not _holds(criteria, MaxTimeCriteria):
        criteria.append(MaxTimeCriteria(options.max_time))
    stops: list[Stop] = [Criteria(criteria, ids)] if criteria else []
    if options.stop_strings and not _holds(criteria, StopStringCriteria):
        prompts = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
        stops.append(StopStrings(options.stop_strings, tokenizer, prompts))
    return stops


class StopStrings:
    """Watches the new text of each row for one of several strings.

    The text is that which follows the prompt's, with the space that it may begin with, special
    tokens included.
    """

    def __init__(self, strings: tuple[str, ...], tokenizer: Any, prompts: list[list[int]]) -> None:
        """
        Args:
            strings: What to look for.
            tokenizer: Makes text of tokens.
            prompts: Tokens of each row.

        Raises:
            ConfigError: If there is no tokenizer.
        """
        if tokenizer is None:
            raise ConfigError("stop_strings need the tokenizer: pass tokenizer=...")
        self._strings = strings
        self._rows = [Detokenizer(tokenizer, prompt=prompt) for prompt in prompts]
        # the end of what is certain, too short for a whole string
        self._ends = [""] * len(prompts)
        self._reach = max(map(len, strings)) - 1
        self._found = [False] * len(prompts)

    def add(self, tokens: Tensor) -> Tensor:
        for row, token in enumerate(tokens.tolist()):
            if self._found[row]:
                continue
            certain = self._ends[row] + self._rows[row].add([token])
            text = certain + self._rows[row].pending
            self._found[row] = any(s in text for s in self._strings)
            self._ends[row] = certain[max(len(certain) - self._reach, 0) :]
        return torch.tensor(self._found)


class Criteria:
    """Asks criteria of transformers, which get all tokens so far and no scores."""

    def __init__(self, criteria: list[Any], ids: Tensor) -> None:
        self._criteria = StoppingCriteriaList(criteria)
        self._ids = ids

    def add(self, tokens: Tensor) -> Tensor:
        self._ids = torch.cat([self._ids, tokens[:, None].to(self._ids.device)], dim=1)
        ended: Tensor = self._criteria(self._ids, None)
        return ended.cpu()


def _holds(criteria: list[Any], kind: type) -> bool:
    return any(type(one) is kind for one in criteria)
