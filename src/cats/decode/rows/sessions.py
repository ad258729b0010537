"""Many sessions on one model, decoded together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any
from weakref import finalize

import torch
from torch import nn

from cats.decode.inputs import Prompts
from cats.decode.request import Request
from cats.decode.rows import thread
from cats.decode.rows.alone import OneByOne
from cats.decode.rows.engine import RowEngine
from cats.decode.rows.engines import check_row_engine, make_row_engine
from cats.decode.rows.inbox import Inbox
from cats.decode.rows.open_session import OpenSession
from cats.decode.rows.progress import Progress
from cats.decode.rows.row import Ticket
from cats.decode.rows.scheduler import Scheduler
from cats.decode.rows.watch import Watch
from cats.decode.state import device_of
from cats.decode.tracing import casts
from cats.decode.values import integer, number
from cats.errors import ConfigError, DataError, UnsupportedModelError
from cats.protocols import ModelConfig, Tokenizer

_DEFAULT_CONTEXT = 2048


class Sessions:
    """Decodes all sessions that are open at a time together, each with its own options.

    Any thread may open, read and cancel sessions. They are admitted in the order in which they
    came. One that fails harms no other. What a session gives does not depend on the others, except
    for the rounding of sums: a step of several rows may add up in another order than a single one.

    Example:
        >>> with cats.Sessions(model, tokenizer=tokenizer) as sessions:
        ...     cat = sessions.open("A cat is", max_new_tokens=20)
        ...     dog = sessions.open("A dog is", max_new_tokens=20, do_sample=True, seed=1)
        ...     print(cat.result().text, dog.result().text)

    Attributes:
        rows: How many sessions decode together at most; the others wait.
        context: How many tokens a session may have, its new ones included.
        cache_tokens: How many tokens the cache holds: ``context`` for each of its lines. All of its
            memory is taken when this object is made.
        refusal: Why the sessions of this model run one after the other; None where they do not.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Tokenizer | None = None,
        rows: int = 16,
        context: int | None = None,
        cache_tokens: int | None = None,
        longest_wait: float = 0.05,
        engine: str = "modules",
    ) -> None:
        """
        Args:
            model: A Hugging Face causal model, sparse or dense. A change of it is seen when the
                next session is admitted.
            tokenizer: Makes ids of texts, and texts of ids.
            rows: How many sessions decode together at most.
            context: Tokens of the longest session. None takes the model's context, but at most
                2,048.
            cache_tokens: Tokens of the cache, for sessions and for what ended ones have left. None
                takes as many as ``rows`` sessions can need.
            longest_wait: Seconds for which pieces of new prompts may delay the next tokens of the
                sessions that decode. A piece has at least 8 tokens, however long they take.
            engine: What runs the steps. ``"modules"``: the modules of the model, on any device.
                ``"stream"``: kernels that read each weight once for all rows, up to 16, on CUDA
                with 16-bit weights. It has run in an emulator only, so it must be asked for. It
                stores ``down`` of each MLP column by column, in place.

        Raises:
            ConfigError: If a number is out of range, or ``cache_tokens`` is less than ``context``.
            UnsupportedModelError: If the model does not cache plain keys and values.
            BackendError: If ``stream`` cannot run the model, or there is no memory for the cache.
        """
        model = getattr(model, "_orig_mod", model)
        config: ModelConfig | None = getattr(model, "config", None)
        if config is None or not hasattr(config, "get_text_config"):
            raise UnsupportedModelError(
                f"expected a Hugging Face causal model, got {type(model).__name__}"
            )
        self._config = config.get_text_config(decoder=True)
        self.rows = _positive("rows", rows)
        self.context = self._checked_context(context)
        limit = self.rows * self.context
        wanted = limit if cache_tokens is None else _positive("cache_tokens", cache_tokens)
        lines = wanted // self.context
        if lines == 0:
            raise ConfigError(
                f"cache_tokens={wanted} holds no session of context={self.context} tokens: raise "
                "cache_tokens, or give a smaller context"
            )
        self.cache_tokens = lines * self.context
        self.rows = min(self.rows, lines)
        check_row_engine(engine)
        wait = number("longest_wait", longest_wait)
        if not wait > 0:
            raise ConfigError(f"expected a positive longest_wait, got {wait}")
        if casts(device_of(model)):
            raise ConfigError("sessions do not follow torch.autocast: convert the model")
        self._model, self._tokenizer = model, tokenizer
        self._inbox = Inbox()
        self.refusal: str | None = None
        worker = self._make_worker(engine, lines, wait)
        # the thread knows the worker, not this object, which ends it when nobody refers to it; a
        # garbage collection must not wait, since it may hold a lock that the thread needs
        self._thread = thread.start(worker.run, self._inbox)
        finalize(self, self._inbox.close).atexit = False

    def open(
        self,
        prompt: Prompts,
        *,
        callback: Callable[[int], object] | None = None,
        on_change: Callable[[], object] | None = None,
        skip_special_tokens: bool = True,
        logprobs: int | None = None,
        count_reads: bool = False,
        **options: Any,
    ) -> OpenSession:
        """Begin a session; it runs from now on, whether it is read or not.

        Args:
            prompt: One prompt, as in :func:`cats.generate`.
            callback: Called with each token, in a thread of its own. What it raises ends the
                session, and is raised again where the session is read.
            on_change: Called after each token and at the end, by the thread that decodes all
                sessions: it must return at once and must not raise. It is for event loops, which
                then read :meth:`OpenSession.so_far`.
            skip_special_tokens: Whether the session's text leaves out special tokens.
            logprobs: Record the log probability of each new token, and those of so many of the
                likeliest ones.
            count_reads: Count the share of the dense model's weights that tokens read, at every
                8th one. Such a step runs the model's modules, which takes longer.
            **options: As in :func:`cats.generate`; each session has its own.

        Raises:
            ConfigError: If an option is unknown or out of range, the session can never fit, or
                these sessions are closed.
            DataError: If the prompt is none of the model's, or there is more than one.
        """
        if callback is not None and not callable(callback):
            raise ConfigError(f"callback: expected a function, got {type(callback).__name__}")
        if logprobs is not None and integer("logprobs", logprobs) < 0:
            raise ConfigError(f"expected logprobs >= 0, got {logprobs}")
        if self.refusal is not None and (logprobs is not None or count_reads):
            raise ConfigError(
                "logprobs and count_reads need sessions that decode together, and those of this "
                f"model run one after the other: {self.refusal}"
            )
        request = self._request(prompt, options)
        progress = Progress(on_change)
        self._inbox.put(Ticket(request, progress, logprobs=logprobs, count_reads=count_reads))
        return OpenSession(
            tuple(request.ids[0].tolist()),
            progress,
            self,
            tokenizer=self._tokenizer,
            skip_special_tokens=skip_special_tokens,
            callback=callback,
        )

    @property
    def is_alive(self) -> bool:
        """Whether sessions can be opened: these are not closed, and nothing has ended them."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Cancel all sessions, wait until the running step has ended, and free the cache."""
        self._inbox.close()
        thread.join(self._thread)

    def __enter__(self) -> Sessions:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _request(self, prompt: Prompts, options: Mapping[str, Any]) -> Request:
        request = Request.of(self._model, self._config, prompt, None, options, self._tokenizer)
        if len(request.ids) > 1:
            raise DataError(
                f"a session continues one prompt once, got {len(request.ids)} rows: open one "
                "session for each"
            )
        if request.extras:
            raise DataError(
                f"sessions take ids only, got {', '.join(sorted(request.extras))} as well: use "
                "cats.Decoder"
            )
        # what the mask leaves out, no token sees, and it counts in no position
        ids = request.ids[request.mask][None]
        new = request.options.max_new_tokens
        if ids.shape[1] + new > self.context:
            raise ConfigError(
                f"the prompt has {ids.shape[1]} tokens and {new} new ones were asked for, but a "
                f"session may have {self.context} in all: shorten one of them, or make Sessions "
                "with a larger context"
            )
        mask = torch.ones_like(ids, dtype=torch.bool)
        return replace(request, ids=ids, mask=mask)

    def _checked_context(self, context: int | None) -> int:
        of_model = getattr(self._config, "max_position_embeddings", None)
        # some models say -1 for any length
        limit = of_model if of_model is not None and of_model > 0 else None
        if context is None:
            return min(_DEFAULT_CONTEXT, limit or _DEFAULT_CONTEXT)
        context = _positive("context", context)
        if limit is not None and context > limit:
            raise ConfigError(f"expected a context up to the model's, {limit}; got {context}")
        return context

    def _make_worker(self, name: str, lines: int, longest_wait: float) -> Scheduler | OneByOne:
        model, context, rows = self._model, self.context, self.rows
        watch = Watch(model)

        # the worker must not know this object
        def make_engine() -> RowEngine:
            engine = make_row_engine(name, model, lines, context, rows=rows)
            watch.change()  # what making the engine has changed is no news
            return engine

        try:
            engine = make_engine()
        except UnsupportedModelError as error:
            self.refusal = str(error)
            warnings.warn(
                f"sessions of {type(model).__name__} run one after the other: {error}",
                stacklevel=3,
            )
            return OneByOne(model, self._inbox)
        return Scheduler(
            engine,
            self._inbox,
            rows=rows,
            vocabulary=self._config.vocab_size,
            longest_wait=longest_wait,
            change=watch.change,
            make_engine=make_engine,
        )


def _positive(name: str, value: object) -> int:
    count = integer(name, value)
    if count < 1:
        raise ConfigError(f"expected a positive {name}, got {count}")
    return count
