"""Server-sent events, and answers that end when their reader leaves."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from cats.serving.errors import ApiError, api_error

_log = logging.getLogger("cats.serving")

# Within this time, an error still gets a status of its own.
_LONGEST_SILENCE = 5.0
# Proxies close connections on which nothing comes.
_PING = 15.0
# A client that reads nothing for so long has left.
_LONGEST_SEND = 60.0
_COMMENT = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"


def event(value: object, name: str | None = None) -> bytes:
    """One event with a JSON document."""
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + data + b"\n\n"


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=error.headers)


class EventStream(Response):
    """Sends events as they come."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        leave: Callable[[], None],
        error_event: Callable[[ApiError], bytes],
        tail: bytes,
    ) -> None:
        """
        Args:
            events: All of them.
            leave: Called when the client has left; the events end then.
            error_event: Makes an event of an error in the middle of the stream.
            tail: What ends a stream after such an event.
        """
        super().__init__()
        self._events, self._leave, self._error_event = events, leave, error_event
        self._tail, self._last = tail, time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(_watch(receive, self._leave))
        pinger: asyncio.Task[None] | None = None
        first = asyncio.ensure_future(anext(self._events, None))
        try:
            await asyncio.wait({first}, timeout=_LONGEST_SILENCE)
            if first.done() and isinstance(first.exception(), Exception):
                await error_response(_logged(first.exception()))(scope, receive, send)
                return
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-store"),
                # nginx would collect events
                (b"x-accel-buffering", b"no"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            pinger = asyncio.create_task(self._ping(send))
            await self._send_all(first, send)
            pinger.cancel()
            await _send(send, b"", more=False)
        except TimeoutError:
            _log.warning("a client has not read its stream for %g seconds", _LONGEST_SEND)
        finally:
            for task in (watcher, pinger, first):
                if task is not None:
                    task.cancel()
            self._leave()

    async def _send_all(self, first: asyncio.Future[bytes | None], send: Send) -> None:
        try:
            body = await first
            while body is not None:
                self._last = time.monotonic()
                await _send(send, body)
                body = await anext(self._events, None)
        except TimeoutError:
            raise
        except Exception as error:  # whatever fails, the client gets to know
            body = self._error_event(_logged(error)) + self._tail
            await _send(send, body)

    async def _ping(self, send: Send) -> None:
        while True:
            await asyncio.sleep(_PING)
            if time.monotonic() - self._last >= _PING:
                await send({"type": "http.response.body", "body": _COMMENT, "more_body": True})


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    """
    Raises:
        TimeoutError: If the client reads nothing.
    """
    async with asyncio.timeout(_LONGEST_SEND):
        await send({"type": "http.response.body", "body": body, "more_body": more})


async def whole(request: Request, events: AsyncIterator[object], leave: Callable[[], None]) -> None:
    """Run through all events; they end when the client leaves."""
    watcher = asyncio.create_task(_watch(request.receive, leave))
    try:
        async for _ in events:
            pass
    finally:
        watcher.cancel()


async def _watch(receive: Receive, leave: Callable[[], None]) -> None:
    with suppress(asyncio.CancelledError):
        while (await receive())["type"] != "http.disconnect":
            pass
        leave()


def _logged(error: Any) -> ApiError:
    if not isinstance(error, ApiError):
        _log.error("an answer failed", exc_info=error)
    return api_error(error)
