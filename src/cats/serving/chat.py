"""``/v1/chat/completions``: fields of a request, and answers in OpenAI's form."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from cats.serving.answers import Answers, Order, Piece
from cats.serving.errors import refused
from cats.serving.events import event
from cats.serving.fields import AnswerFields
from cats.serving.form import Form, Head
from cats.serving.messages import Message, NamedTool, Tool
from cats.serving.models import ServedModel
from cats.serving.orders import order_of
from cats.serving.tokens import chat_logprobs
from cats.serving.tool_reader import CallPart, ToolReader
from cats.serving.tools import ToolUse


class ChatRequest(AnswerFields):
    """The body of a request."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise PydanticCustomError(
                "max_tokens",
                "max_tokens and max_completion_tokens cannot both be set; the latter is the newer "
                "name",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs to be true")
        if self.continue_final_message and self.add_generation_prompt:
            raise PydanticCustomError(
                "continue_final_message",
                "continue_final_message and add_generation_prompt cannot both be true",
            )
        return self


def order_of_chat(fields: ChatRequest, served: ServedModel) -> tuple[Order, ToolUse | None]:
    """What the engine is asked, and which tools may be called. Runs in the thread of prompts.

    Raises:
        ApiError: If the request cannot be right.
    """
    tools = ToolUse.of(fields, served)
    continues = bool(fields.continue_final_message)
    variables = fields.chat_template_kwargs or {}
    if taken := variables.keys() & _OWN_VARIABLES:
        raise refused(f"chat_template_kwargs cannot set {min(taken)}", "chat_template_kwargs")
    ids = served.prompts.ids_of_chat(
        [message.for_template() for message in fields.messages],
        tools.for_template if tools is not None else None,
        add_generation_prompt=not continues and fields.add_generation_prompt is not False,
        continue_final_message=continues,
        variables=variables,
    )
    grammar = None
    schema = fields.response_format.schema_of_text if fields.response_format else None
    if schema is not None:
        grammar = served.grammars.of_schema(schema, "response_format")
    if tools is not None and tools.grammar is not None:
        if grammar is not None:
            raise refused(
                "response_format cannot be used where a tool has to be called", "response_format"
            )
        grammar = tools.grammar, "tools"
    order = order_of(
        fields,
        served,
        ids,
        max_tokens=fields.max_completion_tokens or fields.max_tokens,
        param="messages",
        logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
        grammar=grammar,
        continues=continues,
        shown_specials=tools.specials if tools is not None else frozenset(),
    )
    return order, tools


# Arguments of apply_chat_template that are not variables of the template.
_OWN_VARIABLES = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "documents",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}


class ChatForm(Form):
    """Makes chunks, or one document, of the pieces of answers."""

    def __init__(
        self,
        fields: ChatRequest,
        served: ServedModel,
        answers: Answers,
        tools: ToolUse | None,
    ) -> None:
        super().__init__(served, answers)
        self._fields = fields
        self._head = Head("chatcmpl", "chat.completion", served.id)
        self._chunk_head = self._head.fields(".chunk")
        self._limit = 1 if fields.parallel_tool_calls is False else None
        self._tools = tools
        options = fields.stream_options
        self._shows_usage = bool(options and options.include_usage)
        self._choices = [_Choice(self._reader()) for _ in range(fields.count)]

    def begin(self) -> bytes:
        return b"".join(
            self._event(i, {"role": "assistant", "content": ""}) for i in range(len(self._choices))
        )

    def add(self, piece: Piece) -> bytes:
        choice = self._choices[piece.index]
        logprobs = self._logprobs(piece)
        events = []
        for part in choice.parts(piece):
            delta = {"content": part} if isinstance(part, str) else {"tool_calls": [_delta(part)]}
            events.append(self._event(piece.index, delta, logprobs, meter=piece.meter))
            logprobs = piece.meter = None
        if choice.is_full and piece.finish is None:
            self._answers.cut(piece.index)
        if logprobs is not None or piece.meter is not None:
            events.append(self._event(piece.index, {"content": ""}, logprobs, meter=piece.meter))
        if piece.finish is not None:
            events.append(self._event(piece.index, {}, finish=choice.finish(piece)))
        return b"".join(events)

    def end(self) -> bytes:
        if not self._shows_usage:
            return b""
        return event({**self._chunk_head, "choices": [], "usage": self._answers.usage()})

    def keep(self, piece: Piece) -> None:
        choice = self._choices[piece.index]
        for part in choice.parts(piece):
            choice.keep(part)
        if choice.is_full and piece.finish is None:
            self._answers.cut(piece.index)
        if piece.logprobs:
            choice.logprobs += chat_logprobs(self._served, piece.tokens, piece.logprobs)
        if piece.finish is not None:
            choice.ended = choice.finish(piece)

    def document(self) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "message": choice.message(),
                "logprobs": {"content": choice.logprobs, "refusal": None}
                if self._fields.logprobs
                else None,
                "finish_reason": choice.ended,
            }
            for i, choice in enumerate(self._choices)
        ]
        return {**self._head.fields(), "choices": choices, "usage": self._answers.usage()}

    def _reader(self) -> ToolReader | None:
        if self._tools is None:
            return None
        return ToolReader(self._tools.format, limit=self._limit)

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not piece.logprobs:
            return None
        content = chat_logprobs(self._served, piece.tokens, piece.logprobs)
        return {"content": content, "refusal": None}

    def _event(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        *,
        finish: str | None = None,
        meter: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk: dict[str, Any] = {**self._chunk_head, "choices": [choice]}
        if self._shows_usage:
            chunk["usage"] = None
        if meter is not None:
            chunk["meter"] = meter
        return event(chunk)


class _Choice:
    """One answer: its text and its calls."""

    def __init__(self, reader: ToolReader | None) -> None:
        self._reader = reader
        self._texts: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.ended: str | None = None

    @property
    def is_full(self) -> bool:
        return self._reader is not None and self._reader.is_full

    def parts(self, piece: Piece) -> list[str | CallPart]:
        if self._reader is None:
            return [piece.text] if piece.text else []
        parts = self._reader.add(piece.text)
        return parts + self._reader.end() if piece.finish is not None else parts

    def finish(self, piece: Piece) -> str | None:
        called = self._reader is not None and self._reader.calls > 0
        # calls that were cut off cannot be made
        return "tool_calls" if called and piece.finish == "stop" else piece.finish

    def keep(self, part: str | CallPart) -> None:
        if isinstance(part, str):
            self._texts.append(part)
        elif part.name is not None:
            function = {"name": part.name, "arguments": part.arguments}
            self._calls.append({"id": part.id, "type": "function", "function": function})
        else:
            self._calls[part.index]["function"]["arguments"] += part.arguments

    def message(self) -> dict[str, Any]:
        text = "".join(self._texts)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._calls:
            message |= {"content": text or None, "tool_calls": self._calls}
        return message


def _delta(part: CallPart) -> dict[str, Any]:
    delta: dict[str, Any] = {"index": part.index, "function": {"arguments": part.arguments}}
    if part.name is not None:
        delta |= {"id": part.id, "type": "function"}
        delta["function"] = {"name": part.name, "arguments": part.arguments}
    return delta
