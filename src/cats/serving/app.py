"""The routes of the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp

from cats.serving.answers import Answers, Order
from cats.serving.bell import Bell
from cats.serving.chat import ChatForm, ChatRequest, order_of_chat
from cats.serving.completions import CompletionForm, CompletionRequest, order_of_completion
from cats.serving.errors import ApiError, refused
from cats.serving.events import error_response
from cats.serving.fields import Fields, first_problem
from cats.serving.gate import Gate
from cats.serving.messages import Message, Tool
from cats.serving.metrics import Metrics
from cats.serving.models import Models, ServedModel
from cats.serving.page import chat_page
from cats.serving.responses import ResponsesForm, ResponsesRequest, order_of_response
from cats.serving.settings import Settings
from cats.version import __version__

T = TypeVar("T")


class TokenizeRequest(Fields):
    """The body of a request to ``/tokenize``: a text, or messages in the model's template."""

    model: str
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=4096)
    tools: list[Tool] | None = Field(default=None, max_length=128)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class Server:
    """What the routes share."""

    def __init__(self, models: Models, settings: Settings, metrics: Metrics) -> None:
        self.models, self.settings, self.metrics = models, settings, metrics
        self.bell: Bell | None = None

    def answers(self, served: ServedModel, order: Order) -> Answers:
        """Open the sessions of an order.

        Raises:
            ApiError: If there is no place, or the engine refuses the order.
        """
        if self.bell is None:
            self.bell = Bell(asyncio.get_running_loop())
        return Answers(
            served,
            order,
            bell=self.bell,
            metrics=self.metrics,
            timeout=self.settings.request_timeout,
        )

    async def prepare(
        self, fields: Any, function: Callable[[Any, ServedModel], T]
    ) -> tuple[ServedModel, T]:
        """The model that a request names, and what a function makes of both.

        The function runs in the thread of prompts.

        Raises:
            ApiError: If there is no such model, or what the function raises.
        """
        served = self.models.get(fields.model)
        try:
            return served, await served.prompts.run(function, fields, served)
        except RecursionError:
            raise refused("the request is nested too deeply") from None


def make_app(models: Models, settings: Settings) -> ASGIApp:
    """The application; closing its models is left to the caller."""
    metrics = Metrics(models)
    server = Server(models, settings, metrics)

    # no documents with scripts of other hosts
    app = FastAPI(title="cats serve", version=__version__, docs_url=None, redoc_url=None)
    app.state.server = server
    _add_errors(app)
    _add_routes(app, server)
    paths = {path for route in app.routes if (path := getattr(route, "path", None))}
    return Gate(app, settings=settings, metrics=metrics, routes=paths)


def _add_routes(app: FastAPI, server: Server) -> None:
    shown = chat_page()

    @app.post("/v1/chat/completions")
    async def chat(fields: ChatRequest, request: Request) -> Response:
        served, (order, tools) = await server.prepare(fields, order_of_chat)
        form = ChatForm(fields, served, server.answers(served, order), tools)
        return await form.respond(request, stream=bool(fields.stream))

    @app.post("/v1/completions")
    async def completions(fields: CompletionRequest, request: Request) -> Response:
        served, order = await server.prepare(fields, order_of_completion)
        form = CompletionForm(fields, served, server.answers(served, order))
        return await form.respond(request, stream=bool(fields.stream))

    @app.post("/v1/responses")
    async def responses(fields: ResponsesRequest, request: Request) -> Response:
        served, order = await server.prepare(fields, order_of_response)
        form = ResponsesForm(fields, served, server.answers(served, order))
        return await form.respond(request, stream=bool(fields.stream))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model.describe() for model in server.models]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return server.models.get(name).describe()

    @app.post("/tokenize")
    async def tokenize(fields: TokenizeRequest) -> dict[str, Any]:
        _, result = await server.prepare(fields, _tokenized)
        return result

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = all(model.is_alive for model in server.models)
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(shown.html, headers=shown.headers)


def _tokenized(fields: TokenizeRequest, served: ServedModel) -> dict[str, Any]:
    if (fields.prompt is None) == (fields.messages is None):
        raise refused("expected either prompt or messages", "prompt")
    prompts = served.prompts
    if fields.messages is not None:
        ids = prompts.ids_of_chat(
            [message.for_template() for message in fields.messages],
            [tool.for_template() for tool in fields.tools or ()],
            add_generation_prompt=fields.add_generation_prompt,
        )
    else:
        ids = prompts.ids_of_text(
            fields.prompt or "", "prompt", add_special_tokens=fields.add_special_tokens
        )
    strings = served.tokenizer.convert_ids_to_tokens(ids) if fields.return_token_strs else None
    return {
        "count": len(ids),
        "max_model_len": served.sessions.context,
        "tokens": ids,
        "token_strs": strings,
    }


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        message, param = first_problem(error.errors())
        return error_response(refused(message, param))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        messages = {
            404: f"there is no {request.method} {request.url.path[:100]} here",
            405: f"{request.url.path[:100]} does not take {request.method}",
            400: "the body of the request cannot be read as JSON",
        }
        message = messages.get(error.status_code, str(error.detail))
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return error_response(
            ApiError(error.status_code, message, code=code, headers=error.headers)
        )
