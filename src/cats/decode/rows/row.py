"""One session while it decodes."""

from __future__ import annotations

import numpy as np
import torch

from cats.decode.request import Request
from cats.decode.rows.choice import Choice
from cats.decode.rows.lines import Ids, Line
from cats.decode.rows.progress import Progress
from cats.decode.sampling import check_drawn
from cats.decode.stop import stops_of


class Ticket:
    """A session that waits to be admitted.

    Attributes:
        request: Its prompt, one row without padding, and its options.
        progress: Where its tokens go.
        seed: Of its draws.
        stops: What ends it besides its end tokens and its length; a time limit begins now.
        prompt: Its token ids.
        logprobs: Of how many of the likeliest tokens log probabilities are recorded; None records
            none.
        count_reads: Whether the share of weights that tokens read is counted.
    """

    def __init__(
        self,
        request: Request,
        progress: Progress,
        *,
        logprobs: int | None = None,
        count_reads: bool = False,
    ) -> None:
        """
        Raises:
            ConfigError: If stop strings have no tokenizer, or a criterion cannot be used.
        """
        self.request, self.progress = request, progress
        self.logprobs, self.count_reads = logprobs, count_reads
        self.stops = stops_of(request.options, request.tokenizer, request.ids, request.mask)
        seed = request.options.seed
        if seed is None:
            # as in a decoder, greedy sessions leave torch's own generator as it is
            seed = int(torch.randint(2**62, ())) if request.options.sampling.do_sample else 0
        self.seed = seed
        self.prompt: Ids = request.ids[0].cpu().numpy()


class Row:
    """A session with a line of the cache.

    Attributes:
        number: Grows from one admitted session to the next.
        line: Its line.
        prompt: Its token ids.
        ids: The same, ``[T]``, on the model's device.
        done: How many of them are in the cache.
        started: How many tokens were chosen, those among them that the host has not read yet.
        limit: How many tokens are chosen at most.
        choice: How tokens are chosen.
        progress: Where they go.
        counts_at: The number of chosen tokens from which on the share of weights that a token
            reads is counted; None where it is not.
    """

    def __init__(
        self, ticket: Ticket, line: Line, number: int, *, device: torch.device, vocabulary: int
    ) -> None:
        """
        Raises:
            ConfigError: If transformers does not take the settings.
        """
        options = ticket.request.options
        self.number, self.line = number, line
        self.prompt = ticket.prompt
        self.ids = ticket.request.ids[0].to(device)
        self.done = self.started = 0
        self.limit = options.max_new_tokens
        self.progress = ticket.progress
        self.counts_at = 1 if ticket.count_reads else None
        self.choice = Choice(
            self.ids, options, vocabulary, seed=ticket.seed, logprobs=ticket.logprobs
        )
        self._stops = ticket.stops
        self._eos = frozenset(options.eos_token_ids)

    @property
    def position(self) -> int:
        """Position of the newest token, which is its slot in the line."""
        return len(self.prompt) + self.started - 1

    def reached(self, done: int) -> None:
        """The first ``done`` tokens of the prompt are in the cache."""
        self.line.hold(self.done, self.prompt[self.done : done])
        self.done = done
        self.line.writes(done)

    def start(self) -> None:
        """A step has run the newest token, and chosen another."""
        self.started += 1

    def take(self, token: int) -> str | None:
        """Pass on the next token; returns why the session ends with it, or None.

        Raises:
            Exception: What asks whether it is the last raises.
        """
        tokens = torch.tensor([token])
        if self.choice.options.sampling.do_sample:
            check_drawn(tokens)
        earlier = self.progress.tokens
        if earlier:
            # the step that chose this token has written the one before
            newest = len(self.prompt) + len(earlier) - 1
            self.line.hold(newest, np.asarray(earlier[-1:]))
        recorded = self.choice.logprobs
        self.progress.add(token, None if recorded is None else recorded.take())
        ended = token in self._eos
        for stop in self._stops:
            ended |= bool(stop.add(tokens))
        if ended:
            return "stop"
        return "length" if len(self.progress.tokens) == self.limit else None
