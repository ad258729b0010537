"""A session as its user sees it: text or tokens as they come, a result, and a way to end it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

from cats.decode.rows.logprobs import TokenLogprobs
from cats.decode.rows.progress import Progress
from cats.decode.text import Detokenizer
from cats.errors import ConfigError
from cats.protocols import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a session gave.

    Attributes:
        tokens: The new tokens.
        text: Their text; None without a tokenizer.
        reason: Why it ended: ``"stop"``, ``"length"`` or ``"cancelled"``.
        prompt_tokens: Tokens of the prompt.
        reused_tokens: How many of them the cache held already.
    """

    tokens: tuple[int, ...]
    text: str | None
    reason: str
    prompt_tokens: int
    reused_tokens: int


class OpenSession:
    """One prompt and its continuation, decoded together with the other open sessions.

    Any thread may read it, more than one at a time; each reads all of it. Without a callback, a
    session that nobody refers to any more is cancelled.

    Example:
        >>> for text in sessions.open("A cat is", max_new_tokens=20):
        ...     print(text, end="")

    Attributes:
        prompt: Token ids of the prompt.
    """

    def __init__(
        self,
        prompt: tuple[int, ...],
        progress: Progress,
        owner: object,
        *,
        tokenizer: Tokenizer | None,
        skip_special_tokens: bool,
        callback: Callable[[int], object] | None,
    ) -> None:
        self._caller: threading.Thread | None = None
        self.prompt = prompt
        self._progress = progress
        self._owner = owner  # dropped, it would cancel its sessions
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        if callback is not None:
            # in a thread of its own, so that a slow callback delays no other session
            caller = threading.Thread(
                target=_call, args=(callback, progress, owner), name="cats callback", daemon=True
            )
            caller.start()
            self._caller = caller

    @property
    def reason(self) -> str | None:
        """Why it ended: ``"stop"``, ``"length"``, ``"cancelled"`` or ``"error"``; None before."""
        return self._progress.reason

    @property
    def reused_tokens(self) -> int:
        """Tokens of the prompt that the cache held already; known with the first new token."""
        return self._progress.reused

    @property
    def error(self) -> BaseException | None:
        """What was raised in the session."""
        return self._progress.error

    def so_far(self, start: int = 0) -> list[int]:
        """The new tokens from number ``start`` on that are there already; it does not wait."""
        return self._progress.tokens[start:]

    def logprobs(self, start: int = 0) -> list[TokenLogprobs]:
        """The log probabilities of these tokens, where they are recorded; it does not wait."""
        return self._progress.logprobs[start:]

    @property
    def reads(self) -> list[tuple[int, float]]:
        """What ``count_reads`` has counted so far.

        Each entry is the number of a new token, from 1, and the share of the dense model's weights
        that the step which chose it has read.
        """
        return self._progress.reads

    def cancel(self) -> None:
        """End it before its next token; from any thread."""
        self._progress.cancelled = True

    def tokens(self) -> Iterator[int]:
        """The new tokens from the first, as they come."""
        yield from self._progress.read()
        self._check()

    def __iter__(self) -> Iterator[str]:
        """The new text in pieces. A piece comes once later tokens cannot change it."""
        text = self._detokenizer()
        for token in self.tokens():
            if piece := text.add([token]):
                yield piece
        if piece := text.end():
            yield piece

    def result(self, timeout: float | None = None) -> Answer:
        """Wait for the end.

        Args:
            timeout: Seconds to wait at most.

        Raises:
            TimeoutError: If it has not ended by then. It goes on.
            BaseException: What was raised in this session, by its callback for example.
        """
        start = time.monotonic()
        if not self._progress.wait(timeout):
            raise TimeoutError(f"the session has not ended after {timeout} seconds; it goes on")
        self._check(None if timeout is None else max(0.0, timeout - time.monotonic() + start))
        progress = self._progress
        assert progress.reason is not None
        text = None
        if self._tokenizer is not None:
            whole = self._detokenizer()
            text = whole.add(progress.tokens) + whole.end()
        return Answer(
            tokens=tuple(progress.tokens),
            text=text,
            reason=progress.reason,
            prompt_tokens=len(self.prompt),
            reused_tokens=progress.reused,
        )

    def __del__(self) -> None:
        # its callback goes on without it
        if self._caller is None:
            self._progress.cancelled = True

    def __enter__(self) -> OpenSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def _check(self, timeout: float | None = None) -> None:
        """Wait for the last call of the callback, and raise what was raised in the session."""
        if self._caller is not None and self._caller is not threading.current_thread():
            self._caller.join(timeout)
            if self._caller.is_alive():
                raise TimeoutError("the session has ended, but its callback still runs")
        if self._progress.error is not None:
            raise self._progress.error

    def _detokenizer(self) -> Detokenizer:
        if self._tokenizer is None:
            raise ConfigError("text needs a tokenizer: pass tokenizer=..., or read tokens()")
        return Detokenizer(self._tokenizer, skip_special_tokens=self._skip_special_tokens)


def _call(callback: Callable[[int], object], progress: Progress, owner: object) -> None:
    # the owner must live as long as the callback: dropped, it would cancel the session
    try:
        for token in progress.read():
            callback(token)
    except BaseException as error:  # the session raises it where its result is asked for
        progress.blame(error)
