"""``/v1/responses``: the text part of OpenAI's newer API, without a store of earlier answers."""

from __future__ import annotations

import time
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from cats.serving.answers import Answers, Order, Piece
from cats.serving.errors import ApiError, refused
from cats.serving.events import event
from cats.serving.fields import AnswerFields, Fields, Refused, StreamOptions
from cats.serving.form import Form, new_id
from cats.serving.models import ServedModel
from cats.serving.orders import order_of

_NOTHING: Refused = {
    "background": (False,),
    "conversation": (),
    "include": ([],),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": (),
    "store": (False,),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}


class TextPart(Fields):
    # what the assistant has said comes back with what it was annotated with
    refused: ClassVar[Refused] = {"annotations": ([],), "logprobs": ([],)}

    type: Literal["input_text", "output_text", "text"]
    text: str


class InputMessage(Fields):
    refused: ClassVar[Refused] = {"status": ("completed", "incomplete")}

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _without_id(cls, values: Any) -> Any:
        """An answer that is sent back has an id, which nothing is found by here."""
        if isinstance(values, dict):
            return {name: value for name, value in values.items() if name != "id"}
        return values

    def for_template(self) -> dict[str, Any]:
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": "".join(part.text for part in self.content)}


class TextFormat(Fields):
    """``text.format``: the same as ``response_format``, with the schema one level higher."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    # a name of pydantic's own methods
    schema_: Annotated[dict[str, Any] | bool | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise PydanticCustomError(
                "json_schema", "a schema goes with the type json_schema, and is needed there"
            )
        return self


class TextOptions(Fields):
    refused: ClassVar[Refused] = {"verbosity": ()}

    format: TextFormat | None = None


class ResponsesRequest(Fields):
    """The body of a request."""

    refused: ClassVar[Refused] = _NOTHING

    model: str
    input: str | Annotated[list[InputMessage], Field(min_length=1, max_length=4096)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    text: TextOptions | None = None
    # without effect on the answer
    metadata: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = None


def order_of_response(fields: ResponsesRequest, served: ServedModel) -> Order:
    """What the engine is asked. Runs in the thread of prompts.

    Raises:
        ApiError: If the request cannot be right.
    """
    if isinstance(fields.input, str):
        messages = [{"role": "user", "content": fields.input}]
    else:
        messages = [message.for_template() for message in fields.input]
    if fields.instructions is not None:
        messages.insert(0, {"role": "system", "content": fields.instructions})
    try:
        ids = served.prompts.ids_of_chat(messages)
    except ApiError as error:
        raise refused(error.message, "input", error.code) from error
    common = AnswerFields(model=fields.model, temperature=fields.temperature, top_p=fields.top_p)
    form = fields.text.format if fields.text is not None else None
    grammar = None
    if form is not None and form.type != "text":
        schema = {"type": "object"} if form.schema_ is None else form.schema_
        grammar = served.grammars.of_schema(schema, "text.format")
    return order_of(
        common, served, ids, max_tokens=fields.max_output_tokens, param="input", grammar=grammar
    )


class ResponsesForm(Form):
    """Makes the events of a response, or one document."""

    # this API ends with its last event
    tail = b""

    def __init__(self, fields: ResponsesRequest, served: ServedModel, answers: Answers) -> None:
        super().__init__(served, answers)
        self._fields = fields
        self._id, self._message_id = new_id("resp"), new_id("msg")
        self._created = int(time.time())
        self._text: list[str] = []
        self._finish: str | None = None
        self._number = -1

    def begin(self) -> bytes:
        item = self._item("in_progress", content=False)
        return (
            self._event("response.created", response=self._response("in_progress"))
            + self._event("response.in_progress", response=self._response("in_progress"))
            + self._event("response.output_item.added", output_index=0, item=item)
            + self._event("response.content_part.added", **self._place(), part=_part(""))
        )

    def add(self, piece: Piece) -> bytes:
        self.keep(piece)
        if not piece.text:
            return b""
        return self._event(
            "response.output_text.delta", **self._place(), delta=piece.text, logprobs=[]
        )

    def end(self) -> bytes:
        text = "".join(self._text)
        status = self._status
        return (
            self._event("response.output_text.done", **self._place(), text=text, logprobs=[])
            + self._event("response.content_part.done", **self._place(), part=_part(text))
            + self._event("response.output_item.done", output_index=0, item=self._item(status))
            + self._event(f"response.{status}", response=self.document())
        )

    def keep(self, piece: Piece) -> None:
        self._text.append(piece.text)
        self._finish = piece.finish

    def document(self) -> dict[str, Any]:
        return self._response(self._status)

    def error_event(self, error: ApiError) -> bytes:
        body = error.body()["error"]
        return self._event("error", code=body["code"], message=body["message"], param=body["param"])

    @property
    def _status(self) -> str:
        return "incomplete" if self._finish == "length" else "completed"

    def _response(self, status: str) -> dict[str, Any]:
        fields, ended = self._fields, status != "in_progress"
        usage = self._answers.usage() if ended else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"}
            if status == "incomplete"
            else None,
            "instructions": fields.instructions,
            "max_output_tokens": fields.max_output_tokens,
            "model": self._served.id,
            "output": [self._item(status)] if ended else [],
            "parallel_tool_calls": bool(fields.parallel_tool_calls),
            "previous_response_id": None,
            "store": False,
            "temperature": fields.temperature,
            "text": {"format": {"type": "text"}}
            if fields.text is None or fields.text.format is None
            else {"format": fields.text.format.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": "auto",
            "tools": [],
            "top_p": fields.top_p,
            "truncation": "disabled",
            "usage": None
            if usage is None
            else {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
            "metadata": fields.metadata or {},
        }

    def _item(self, status: str, *, content: bool = True) -> dict[str, Any]:
        return {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [_part("".join(self._text))] if content else [],
        }

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message_id, "output_index": 0, "content_index": 0}

    def _event(self, name: str, **values: Any) -> bytes:
        self._number += 1
        return event({"type": name, "sequence_number": self._number, **values}, name)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
