"""Answers that must follow a grammar: llguidance says which tokens may come next."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
import torch
from torch import Tensor

from cats.protocols import Tokenizer
from cats.serving.errors import ApiError, GrammarError, refused

# Small models may write spaces without end where a schema allows any.
_JSON_OPTIONS: Any = {"whitespace_pattern": r"[ \n\t]{0,20}"}


class GrammarMask:
    """Rules out tokens that the grammar does not allow, as a logits processor of one session."""

    def __init__(
        self, matcher: llguidance.LLMatcher, *, prompt_length: int, ends: Sequence[int]
    ) -> None:
        """
        Args:
            matcher: At the start of its grammar; of this session only.
            prompt_length: Tokens of the prompt, which the grammar does not see.
            ends: Tokens that end the answer; where the grammar has ended, nothing else follows.
        """
        self._matcher, self._taken, self._ends = matcher, prompt_length, list(ends)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """
        Args:
            ids: ``[1, T]``, the prompt and all new tokens.
            scores: ``[1, V]``.

        Raises:
            GrammarError: If the grammar cannot go on.
        """
        new = ids[0, self._taken :].tolist()
        self._taken = ids.shape[1]
        if new and not self._matcher.is_stopped():
            self._matcher.consume_tokens(new)
        self._check()
        allowed = torch.zeros(scores.shape[1], dtype=torch.bool)
        if self._matcher.is_stopped():
            allowed[self._ends] = True
        else:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            self._check()
            mask = np.unpackbits(bits, bitorder="little")[: len(allowed)]
            allowed[: len(mask)] = torch.from_numpy(mask).bool()
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(
                f"the grammar of this answer cannot go on: {_line(self._matcher.get_error())}"
            )


class Grammars:
    """Compiles the grammars of requests for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, *, vocabulary: int, ends: Sequence[int]) -> None:
        """
        Args:
            tokenizer: Of the model.
            vocabulary: Number of the model's scores.
            ends: Tokens that end an answer.
        """
        # Any: llguidance asks for a class of transformers
        self._hf_tokenizer: Any = tokenizer
        self._vocabulary, self._ends = vocabulary, list(ends)
        self._lock = threading.Lock()
        self._tokenizer: llguidance.LLTokenizer | None = None

    @property
    def tokenizer(self) -> llguidance.LLTokenizer:
        """llguidance's own form of the tokenizer, made when it is first needed.

        Raises:
            ApiError: If it takes fast tokenizers only, and this is none.
        """
        with self._lock:
            if self._tokenizer is None:
                try:
                    self._tokenizer = llguidance.hf.from_tokenizer(
                        self._hf_tokenizer, n_vocab=self._vocabulary, eos_token=self._ends or None
                    )
                except (ValueError, RuntimeError) as error:
                    raise refused(
                        f"this model's tokenizer cannot follow a grammar: {_line(str(error))}"
                    ) from error
            return self._tokenizer

    def of_schema(self, schema: dict[str, Any] | bool, param: str) -> tuple[str, str]:
        """The grammar of texts that a JSON schema describes, and the field it comes from.

        Raises:
            ApiError: If the schema is nested too deeply, or holds numbers that are too large.
        """
        try:
            # here true means any value, and false none
            text = json.dumps({} if schema is True else schema)
            grammar: str = llguidance.LLMatcher.grammar_from_json_schema(
                text, overrides=_JSON_OPTIONS
            )
        except ValueError as error:
            raise _no_grammar(param, str(error)) from error
        return grammar, param

    def matcher(self, grammar: str, param: str) -> llguidance.LLMatcher:
        """A matcher at the start of a grammar.

        Args:
            grammar: Of :meth:`of_schema`, or in llguidance's form of Lark.
            param: The field of the request that the grammar comes from.

        Raises:
            ApiError: If it is none, or has no end token to end with.
        """
        if not self._ends:
            raise refused(f"{param}: this model has no end token to end such an answer with", param)
        matcher = llguidance.LLMatcher(self.tokenizer, grammar, log_level=0)
        # some faults show when it is first asked
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise _no_grammar(param, matcher.get_error())
        return matcher

    def mask(self, matcher: llguidance.LLMatcher, prompt_length: int) -> GrammarMask:
        """The processor of one session; each session has its own."""
        return GrammarMask(matcher.deep_copy(), prompt_length=prompt_length, ends=self._ends)


def _no_grammar(param: str, reason: str) -> ApiError:
    return refused(f"{param}: no grammar can be made of it: {_line(reason)}", param)


def _line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]
