"""The answers of one request, while the sessions that give them run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cats.decode.rows import OpenSession
from cats.decode.rows.logprobs import TokenLogprobs
from cats.decode.text import Detokenizer
from cats.errors import BackendError, ConfigError, DataError
from cats.serving.bell import Bell
from cats.serving.errors import SERVER, ApiError, api_error, refused
from cats.serving.meter import Meter
from cats.serving.metrics import Metrics
from cats.serving.models import ServedModel
from cats.serving.stops import StopCutter

ScoreFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What a request asks of the engine.

    Attributes:
        ids: Token ids of the prompt.
        options: Of each session, as for :func:`cats.generate`.
        count: How many answers.
        seed: Of the first answer; the others count on from it. None draws any.
        stops: Strings that end an answer and are left out of it.
        logprobs: As for :meth:`cats.Sessions.open`.
        processors: Makes the logits processors of one session.
        metered: Whether speed and share of weights are shown.
        continues: Whether the answer goes on in the prompt's text, so that a space which it begins
            with stays.
        shown_specials: Special tokens whose text is part of the answer.
    """

    ids: list[int]
    options: Mapping[str, Any]
    count: int = 1
    seed: int | None = None
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    processors: Callable[[], list[ScoreFunction]] = list
    metered: bool = False
    continues: bool = False
    shown_specials: frozenset[int] = frozenset()


@dataclass(slots=True)
class Piece:
    """What is new of one answer.

    Attributes:
        index: Number of the answer.
        text: New text.
        tokens: New tokens.
        logprobs: Of these tokens, where they were asked for.
        finish: OpenAI's ``finish_reason`` with the last piece.
        meter: Speed and share of weights, where they were asked for.
    """

    index: int
    text: str
    tokens: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: str | None = None
    meter: dict[str, Any] | None = None


class Answers:
    """Opens the sessions of one request, and gives what they give.

    Attributes:
        left: Whether the client has left.
        prompt_tokens: Tokens of the prompt.
        reasons: Why answers have ended, so far.
    """

    def __init__(
        self, served: ServedModel, order: Order, *, bell: Bell, metrics: Metrics, timeout: float
    ) -> None:
        """
        Raises:
            ApiError: If there is no place, or the engine refuses the order.
        """
        self._served, self._metrics, self._order = served, metrics, order
        self._timeout = timeout
        self._start = time.perf_counter()
        self._event = asyncio.Event()
        self._expired = self._closed = self.left = False
        self.prompt_tokens = len(order.ids)
        self.reasons: list[str] = []
        self._choices: list[_Choice] = []
        try:
            served.queue.enter(order.count)
        except ApiError:
            metrics.refused.labels(served.id).inc()
            raise
        try:
            for index in range(order.count):
                session = self._open(index, bell)
                self._choices.append(_Choice(index, session, served, order))
        except BaseException:
            self.close()
            raise
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(timeout, self._expire)
        metrics.prompt_tokens.labels(served.id).inc(self.prompt_tokens)

    @property
    def new_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(choice.count for choice in self._choices)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that the cache held."""
        return self._choices[0].session.reused_tokens if self._choices else 0

    def usage(self) -> dict[str, Any]:
        """Numbers of tokens in OpenAI's form."""
        new = self.new_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    async def pieces(self) -> AsyncIterator[Piece]:
        """What is new, as it comes, until all answers have ended or the client has left.

        Raises:
            ApiError: If an answer fails or takes too long.
        """
        running = list(self._choices)
        try:
            while running:
                await self._event.wait()
                self._event.clear()
                if self.left:
                    return
                if self._expired:
                    raise ApiError(
                        504,
                        f"this answer took more than {self._timeout:g} seconds: ask for fewer "
                        "tokens, or start the server with a larger --request-timeout",
                        kind=SERVER,
                        code="timeout",
                    )
                for choice in list(running):
                    piece = choice.read()
                    if piece is None:
                        continue
                    if piece.finish is not None:
                        running.remove(choice)
                        self.reasons.append(piece.finish)
                        self._observe(choice, piece.finish)
                    yield piece
        finally:
            self.close()

    def cut(self, index: int) -> None:
        """End one answer, of which no more is wanted; its last piece comes as usual."""
        self._choices[index].is_cut = True
        self._choices[index].session.cancel()

    def leave(self) -> None:
        """The client has left: end everything."""
        self.left = True
        self.close()
        self._event.set()

    def close(self) -> None:
        """Cancel what still runs, and give the places back."""
        if self._closed:
            return
        self._closed = True
        if hasattr(self, "_timer"):
            self._timer.cancel()
        for choice in self._choices:
            choice.session.cancel()
        served, seconds = self._served, time.perf_counter() - self._start
        ended = len(self.reasons) == self._order.count
        served.queue.leave(self._order.count, seconds if ended else None)
        if self._choices:
            self._metrics.cached_tokens.labels(served.id).inc(self.cached_tokens)
            self._metrics.new_tokens.labels(served.id).inc(self.new_tokens)
        if not ended:
            reason = "left" if self.left else "error"
            count = self._order.count - len(self.reasons)
            self._metrics.ends.labels(served.id, reason).inc(count)

    def _open(self, index: int, bell: Bell) -> OpenSession:
        order = self._order
        event = self._event
        options = dict(order.options)
        if order.seed is not None:
            options["seed"] = (order.seed + index) % 2**63
        if processors := order.processors():
            options["logits_processor"] = processors
        try:
            return self._served.sessions.open(
                order.ids,
                on_change=lambda: bell.ring(event),
                logprobs=order.logprobs,
                count_reads=order.metered
                and self._served.is_sparse
                and self._served.sessions.refusal is None,
                **options,
            )
        except (ConfigError, DataError) as error:
            raise refused(str(error)) from error
        except BackendError as error:
            raise ApiError(503, str(error), kind=SERVER, code="engine_failed") from error

    def _expire(self) -> None:
        self._expired = True
        self._event.set()

    def _observe(self, choice: _Choice, reason: str) -> None:
        metrics, name, now = self._metrics, self._served.id, time.perf_counter()
        metrics.ends.labels(name, reason).inc()
        metrics.whole.labels(name).observe(now - self._start)
        if choice.first is not None:
            metrics.first_token.labels(name).observe(choice.first - self._start)
            if choice.count > 1:
                seconds = (now - choice.first) / (choice.count - 1)
                metrics.each_token.labels(name).observe(seconds)


class _Choice:
    """One answer.

    Attributes:
        session: Gives its tokens.
        count: How many tokens were read.
        first: When the first one was read.
        is_cut: Whether it was ended because no more is wanted.
    """

    def __init__(self, index: int, session: OpenSession, served: ServedModel, order: Order) -> None:
        self._index, self.session = index, session
        self.count, self.is_cut = 0, False
        self.first: float | None = None
        self._wants_tokens = order.logprobs is not None or order.metered
        self._logprobs = order.logprobs is not None
        self._cutter = StopCutter(order.stops)
        # a special token that is shown is one that the detokenizer does not know as such
        self._hidden = _special_ids(served) - order.shown_specials if order.shown_specials else None
        self._text = Detokenizer(
            served.tokenizer,
            prompt=order.ids if order.continues else (),
            skip_special_tokens=self._hidden is None,
        )
        self._meter = Meter(is_sparse=served.is_sparse) if order.metered else None

    def read(self) -> Piece | None:
        """What is new; None where there is nothing.

        Raises:
            ApiError: If the session has failed.
        """
        session = self.session
        # before the tokens, since all of them are there when there is a reason
        reason = session.reason
        start = self.count
        tokens = session.so_far(start)
        self.count += len(tokens)
        if tokens and self.first is None:
            self.first = time.perf_counter()
        if reason == "error":
            assert session.error is not None
            raise api_error(session.error)
        if reason == "cancelled" and not self.is_cut:
            raise ApiError(
                503, "the server is shutting down", kind=SERVER, code="server_shutting_down"
            )
        text = self._new_text(tokens, ended=reason is not None)
        if self._cutter.stopped:
            # the engine looks for stop strings among special tokens, which are left out here
            session.cancel()
            reason = "stop"
        if not text and reason is None and not (tokens and self._wants_tokens):
            return None
        piece = Piece(self._index, text, tokens)
        if reason is not None:
            piece.finish = "length" if reason == "length" else "stop"
        if self._logprobs:
            piece.logprobs = session.logprobs(start)[: len(tokens)]
        if self._meter is not None and tokens:
            piece.meter = self._meter.add(self.count, time.perf_counter(), session.reads)
        return piece

    def _new_text(self, tokens: Sequence[int], *, ended: bool) -> str:
        if self._hidden is not None:
            tokens = [token for token in tokens if token not in self._hidden]
        text = self._text.add(tokens)
        if ended:
            text += self._text.end()
        text = self._cutter.add(text)
        return text + self._cutter.end() if ended else text


def _special_ids(served: ServedModel) -> frozenset[int]:
    added = getattr(served.tokenizer, "added_tokens_decoder", {})
    special = {token for token, content in added.items() if content.special}
    return frozenset(special | set(served.tokenizer.all_special_ids))
