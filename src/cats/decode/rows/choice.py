"""The next token of each row, by the row's own options and random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cats.decode.options import Options
from cats.decode.rows.logprobs import LogprobRecorder
from cats.decode.sampling import choose, process


class Choice:
    """How the tokens of one row are chosen.

    Attributes:
        options: Of the session.
        logprobs: Records the log probabilities of chosen tokens; None where nobody asked.
    """

    def __init__(
        self,
        ids: Tensor,
        options: Options,
        vocabulary: int,
        *,
        seed: int,
        logprobs: int | None = None,
    ) -> None:
        """
        Args:
            ids: The prompt, ``[T]``, on the model's device.
            options: Of the session.
            vocabulary: Size of the vocabulary.
            seed: Of the draws.
            logprobs: Of how many of the likeliest tokens log probabilities are recorded, beside
                those of the chosen one; None records none.

        Raises:
            ConfigError: If transformers does not take the settings.
        """
        self.options = options
        self.logprobs = None if logprobs is None else LogprobRecorder(logprobs)
        self._error: Exception | None = None
        self._seen: Tensor | None = None
        if options.sampling.repetition_penalty != 1:
            self._seen = torch.zeros(1, vocabulary, dtype=torch.bool, device=ids.device)
            self._seen.scatter_(1, ids[None], True)
        if options.processors is not None:
            options.processors.begin(ids[None], torch.ones_like(ids[None], dtype=torch.bool))
        # the same numbers in the same order as a decoder draws for one row
        self._generator = torch.Generator(ids.device).manual_seed(seed)

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is taken, and nothing changes or records the scores."""
        sampling = self.options.sampling
        return (
            self.options.processors is None
            and not sampling.do_sample
            and sampling.repetition_penalty == 1
            and self.logprobs is None
        )

    def token(self, logits: Tensor) -> Tensor:
        """The next token, ``[1]``, of logits ``[1, V]``; -1 where none can be drawn."""
        try:
            return self._token(logits)
        except Exception as error:  # the user's code may raise anything; only this row ends
            self._error = error
            return torch.zeros(1, dtype=torch.int64, device=logits.device)

    def take_error(self) -> Exception | None:
        """What choosing the last token raised, in the session's own processors for example.

        That token then means nothing.
        """
        error, self._error = self._error, None
        return error

    def _token(self, logits: Tensor) -> Tensor:
        processors, sampling = self.options.processors, self.options.sampling
        unchanged = logits
        if processors is not None:
            logits = processors.scores(logits)
        scores = process(logits, self._seen, sampling)
        noise = None
        if sampling.do_sample:
            noise = torch.empty_like(scores).exponential_(generator=self._generator)
        token = choose(scores, noise)
        # where nothing can be drawn, the host raises; until then, the row needs a valid token
        valid = token.clamp(min=0)
        if self._seen is not None:
            self._seen.scatter_(1, valid[:, None], True)
        if processors is not None:
            processors.add(valid)
        if self.logprobs is not None:
            self.logprobs.add(unchanged, valid)
        return token


def choose_tokens(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    """One token per row, ``[n]``, of logits ``[n, V]``; -1 where none can be drawn."""
    if all(choice.is_plain for choice in choices):
        return choose(logits.float(), None)
    tokens = [choice.token(logits[i : i + 1]) for i, choice in enumerate(choices)]
    return torch.cat(tokens)
