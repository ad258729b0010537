"""What every request passes first: host, key, size and time of the body; log and metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cats.serving.answers import Answers
from cats.serving.errors import INVALID, ApiError, api_error, refused
from cats.serving.events import error_response
from cats.serving.log import log_request, logger
from cats.serving.metrics import Metrics
from cats.serving.settings import Settings

# Open to everybody: the page asks for the key itself, and supervisors have none.
_OPEN_PATHS = {"/", "/health"}
_LOOPBACK_NAMES = {"localhost", "127.0.0.1", "[::1]", "::1"}
# In paths of metrics, so that a stranger cannot fill the memory with names.
_OTHER = "other"
# Bytes of all headers of a request.
LARGEST_HEADERS = 32 * 1024


class Record:
    """What the log says of a request; routes add to it."""

    def __init__(self) -> None:
        self._model: str | None = None
        self._answers: Answers | None = None

    def watch(self, model: str, answers: Answers) -> None:
        """Log what these answers have come to."""
        self._model, self._answers = model, answers

    def fields(self) -> dict[str, Any]:
        answers = self._answers
        if answers is None:
            return {}
        return {
            "model": self._model,
            "prompt_tokens": answers.prompt_tokens,
            "cached_tokens": answers.cached_tokens,
            "new_tokens": answers.new_tokens,
            "finish": ",".join(answers.reasons) or ("left" if answers.left else "error"),
        }


class Gate:
    """An ASGI application around another one."""

    def __init__(
        self, app: ASGIApp, *, settings: Settings, metrics: Metrics, routes: set[str]
    ) -> None:
        """
        Args:
            app: Answers what is let in.
            settings: What is let in.
            metrics: Count requests.
            routes: Paths that metrics name.
        """
        self._app, self._settings, self._metrics = app, settings, metrics
        self._routes = routes
        self._keys = [key.encode() for key in settings.api_keys]
        self._hosts = _LOOPBACK_NAMES | set(settings.allowed_hosts) if settings.is_local else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0
        request_id = f"req_{secrets.token_hex(8)}"
        record = Record()
        scope.setdefault("state", {})["record"] = record

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                ]
            await send(message)

        try:
            await self._pass(scope, receive, sending)
        except Exception as error:  # our own bug: the client gets the form of all errors
            logger.error("%s: a request failed", request_id, exc_info=error)
            if not status:
                await error_response(api_error(error))(scope, receive, sending)
        finally:
            path = scope["path"]
            route = path if path in self._routes else _OTHER
            self._metrics.requests.labels(route, str(status)).inc()
            # the path is a stranger's text
            shown = path[:200].encode("ascii", "backslashreplace").decode()
            log_request(
                {
                    "method": scope["method"],
                    "path": shown.replace("\n", "\\n").replace("\r", "\\r"),
                    "status": status,
                    "seconds": round(time.perf_counter() - start, 4),
                    "id": request_id,
                    "client": (scope.get("client") or ("",))[0] or None,
                    **record.fields(),
                }
            )

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        try:
            _check_size(scope["headers"])
            self._check_host(headers)
            self._check_key(scope["path"], headers)
            body = await self._body(receive, headers)
            _check_characters(body)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        if body is None:
            return  # the client has left
        given = False

        async def receiving() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, receiving, send)

    def _check_host(self, headers: Mapping[str, bytes]) -> None:
        """
        Raises:
            ApiError: If a local server is asked under a foreign name, as by a page on the web whose
                name was made to point to this machine.
        """
        if self._hosts is None:
            return
        host = headers.get("host", b"").decode("latin-1")
        name = host if host.endswith("]") or host.count(":") > 1 else host.partition(":")[0]
        if name.startswith("["):
            name = name.partition("]")[0] + "]"
        if name.lower() not in self._hosts:
            raise ApiError(
                403,
                f"this server answers on this machine only, not as {name[:100]!r}: start it with "
                "--allowed-host NAME if a proxy asks for it under this name",
                code="host_not_allowed",
            )

    def _check_key(self, path: str, headers: Mapping[str, bytes]) -> None:
        """
        Raises:
            ApiError: If the request has none of the keys.
        """
        if not self._keys or path in _OPEN_PATHS:
            return
        scheme, _, key = headers.get("authorization", b"").partition(b" ")
        given = key.strip() if scheme.lower() == b"bearer" else b""
        # all of them are compared, each in a time that does not depend on where they differ
        if sum(hmac.compare_digest(given, own) for own in self._keys) == 0:
            message = "the API key is none of this server's" if given else "this server needs a key"
            raise ApiError(
                401,
                f"{message}: send the header Authorization: Bearer KEY",
                kind=INVALID,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, receive: Receive, headers: Mapping[str, bytes]) -> bytes | None:
        """The body of a request; None where its client has left.

        Raises:
            ApiError: If it is too large or too slow.
        """
        length = headers.get("content-length", b"0")
        # a length that is no number is refused by the HTTP parser
        if length.isdigit() and int(length[:20]) > self._settings.max_body:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.read_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self._settings.max_body:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(
                408,
                f"the body did not arrive within {self._settings.read_timeout:g} seconds",
                code="timeout",
                headers={"Connection": "close"},
            ) from None

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self._settings.max_body} bytes, which this server takes at "
            "most",
            code="request_too_large",
            headers={"Connection": "close"},
        )


def _check_size(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """
    Raises:
        ApiError: If they are too large. The HTTP parser sees this only where they come in parts.
    """
    if sum(len(name) + len(value) for name, value in headers) > LARGEST_HEADERS:
        raise ApiError(
            431,
            f"the headers are larger than {LARGEST_HEADERS} bytes",
            code="headers_too_large",
            headers={"Connection": "close"},
        )


def _check_characters(body: bytes | None) -> None:
    """
    Raises:
        ApiError: If some text is no Unicode: JSON can name half of a surrogate pair, and no
            tokenizer takes it.
    """
    if not body or b"\\u" not in body.lower():
        return
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise refused("some text of the request is no Unicode: half of a surrogate pair") from None
    except (ValueError, RecursionError):
        return  # no JSON, which the route says
