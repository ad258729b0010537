"""Errors in the form of OpenAI's API, whatever raised them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cats.errors import CatsError

INVALID = "invalid_request_error"
SERVER = "server_error"
# What a client learns of an error that is our own bug; the log has the rest.
INTERNAL = "the server failed to answer this request; its log says why"


class ApiError(Exception):
    """An answer with an error status.

    Attributes:
        status: Of HTTP.
        message: What was expected, what came, and what to do.
        kind: OpenAI's ``type``.
        code: OpenAI's ``code``, for programs.
        param: The field of the request that is wrong.
        headers: Of the answer, beside the usual ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.kind, self.code, self.param = kind, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON document that a client gets."""
        error = {
            # half of a surrogate pair, which JSON can name, has no UTF-8
            "message": self.message.encode(errors="replace").decode(),
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


class GrammarError(CatsError):
    """A grammar that a request has asked for cannot go on, such as one that is too complex."""


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be right."""
    return ApiError(400, message, param=param, code=code)


def api_error(error: BaseException) -> ApiError:
    """What a client learns of any error.

    An error that the library raises on purpose says what to do. Others are bugs of a model or ours,
    and may say more than a client should know.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, GrammarError):
        return refused(str(error), code="grammar_failed")
    message = str(error) if isinstance(error, CatsError) else INTERNAL
    return ApiError(500, message, kind=SERVER, code="internal_error")
