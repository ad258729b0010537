"""Messages and tools of a chat, as clients send them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from cats.serving.fields import Fields, Refused

_NAME = r"^[a-zA-Z0-9_.-]{1,64}$"
Name = Annotated[str, Field(pattern=_NAME)]


class TextPart(Fields):
    type: Literal["text"]
    text: str


class CalledFunction(Fields):
    name: Name
    arguments: str


class ToolCall(Fields):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Fields):
    """One message, of any role."""

    refused: ClassVar[Refused] = {
        "audio": (),
        "function_call": (),
        "refusal": (),
        "annotations": ([],),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Message:
        is_assistant = self.role == "assistant"
        if self.content is None and not (is_assistant and self.tool_calls):
            raise PydanticCustomError("content", "a message needs content, a text")
        if self.tool_calls and not is_assistant:
            raise PydanticCustomError("tool_calls", "only messages of the assistant call tools")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise PydanticCustomError(
                "tool_call_id",
                "tool_call_id goes with the role tool, and is needed there",
            )
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it: text instead of parts, arguments as objects."""
        # OpenAI's newer name of the same role
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.text}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": _object_or_text(call.function.arguments),
                    },
                }
                for call in self.tool_calls
            ]
        return message


class Function(Fields):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def schema_of_arguments(self) -> Mapping[str, Any]:
        return self.parameters or {"type": "object", "properties": {}}


class Tool(Fields):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        function["parameters"] = dict(self.function.schema_of_arguments)
        return {"type": "function", "function": function}


class NamedFunction(Fields):
    name: Name


class NamedTool(Fields):
    """The one function that has to be called."""

    type: Literal["function"]
    function: NamedFunction


def _object_or_text(arguments: str) -> Any:
    """Arguments as an object; an earlier answer may have been cut off in the middle of them."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments
