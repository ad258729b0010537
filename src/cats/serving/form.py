"""What the forms of all routes have in common: events or one document, and their head."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cats.serving.answers import Answers, Piece
from cats.serving.errors import ApiError
from cats.serving.events import DONE, EventStream, event, whole
from cats.serving.models import ServedModel
from cats.version import __version__


class Head:
    """Id, time and names at the head of each document and chunk."""

    def __init__(self, prefix: str, kind: str, model: str) -> None:
        self.id = new_id(prefix)
        self.created = int(time.time())
        self._kind, self._model = kind, model

    def fields(self, suffix: str = "") -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self._kind + suffix,
            "created": self.created,
            "model": self._model,
            "system_fingerprint": f"cats-{__version__}",
        }


class Form(ABC):
    """Turns the pieces of answers into what one route sends."""

    # what ends a stream beside its last event
    tail = DONE

    def __init__(self, served: ServedModel, answers: Answers) -> None:
        self._served, self._answers = served, answers

    @abstractmethod
    def begin(self) -> bytes:
        """The events before the first piece."""

    @abstractmethod
    def add(self, piece: Piece) -> bytes:
        """The events of a piece; may be empty."""

    @abstractmethod
    def end(self) -> bytes:
        """The events after the last piece."""

    @abstractmethod
    def keep(self, piece: Piece) -> None:
        """Take a piece for :meth:`document`."""

    @abstractmethod
    def document(self) -> dict[str, Any]:
        """All that was kept."""

    def error_event(self, error: ApiError) -> bytes:
        """An error in the middle of a stream."""
        return event(error.body())

    async def respond(self, request: Request, *, stream: bool) -> Response:
        """The answer to a request, whose client may leave at any time.

        Raises:
            ApiError: If it fails before a byte of it was sent.
        """
        answers = self._answers
        request.state.record.watch(self._served.id, answers)
        if stream:
            return EventStream(
                self._events(), leave=answers.leave, error_event=self.error_event, tail=self.tail
            )
        await whole(request, self._kept(), answers.leave)
        if answers.left:
            return Response(status_code=499)  # nobody reads it; the log does
        return JSONResponse(self.document())

    async def _events(self) -> AsyncIterator[bytes]:
        begun = b""
        async for piece in self._answers.pieces():
            if not begun:
                begun = self.begin()
                yield begun
            if body := self.add(piece):
                yield body
        if not self._answers.left:
            yield self.end() + self.tail

    async def _kept(self) -> AsyncIterator[None]:
        async for piece in self._answers.pieces():
            self.keep(piece)
            yield None


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"
