"""How a model's chat template writes calls of tools, found by writing one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cats.serving.errors import ApiError, refused
from cats.serving.prompts import Prompts

_USER = {"role": "user", "content": "Hello"}
# Names that no template has.
_NAMES = ("get_zq_first", "get_zq_second")
_ARGUMENTS = {"zq_key": "zq_value"}
_CONTENT = "zq_content"
_WRITTEN_ARGUMENTS = re.compile(r'\{\s*"zq_key"\s*:\s*"zq_value"\s*\}')
_OBJECT = re.compile(r'\{\s*"name"\s*:\s*"$')
_OBJECT_KEY = re.compile(r'"\s*,\s*"(\w+)"\s*:\s*$')


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolFormat:
    """What stands around the names and arguments of calls.

    An answer with calls is ``opener``, the calls with ``between`` between them, and ``closer``. A
    call is a JSON object with ``"name"`` and ``arguments_key``, or, where that is None, its name,
    ``separator``, and its arguments as a JSON object.

    Attributes:
        opener: May be empty: such an answer begins with the object.
        between: None where the template knows one call per answer.
        closer: Without the end of the message.
        arguments_key: ``"arguments"`` or ``"parameters"``.
        separator: Between name and arguments, where a call is no JSON object.
        id_length: Characters of the ids of calls, which some templates check.
    """

    opener: str
    between: str | None
    closer: str
    arguments_key: str | None
    separator: str = ""
    id_length: int = 24

    @classmethod
    def of(cls, prompts: Prompts) -> ToolFormat:
        """
        Raises:
            ApiError: If the template knows no tools, or calls have a form that we cannot read.
        """
        tools = [_tool(name) for name in _NAMES]
        with_tools = prompts.text_of_chat([_USER], tools)
        if with_tools == prompts.text_of_chat([_USER]):
            raise refused("this model's chat template knows no tools: leave tools out", "tools")
        id_length, one = _rendered(prompts, tools, 1)
        before_content, _, after_content = _answer(
            prompts.text_of_chat(
                [_USER, {"role": "assistant", "content": _CONTENT}],
                tools,
                add_generation_prompt=False,
            ),
            with_tools,
        ).partition(_CONTENT)

        def of_message(text: str) -> str:
            answer = _answer(text, with_tools).removeprefix(before_content)
            return answer.removesuffix(after_content)

        first = _parse(of_message(one))
        if first is None:
            raise refused(
                "this model's chat template writes calls of tools in a form that this server "
                "cannot read: leave tools out",
                "tools",
            )
        try:
            _, two = _rendered(prompts, tools, 2)
        except ApiError:  # the template forbids two calls
            return cls(**first, between=None, id_length=id_length)
        return cls(
            **first, between=_between(of_message(two), first["arguments_key"]), id_length=id_length
        )

    def head(self, name: str) -> str:
        """What stands before the arguments of a call of this function."""
        if self.arguments_key is None:
            return name + self.separator
        return f'{{"name": "{name}", "{self.arguments_key}": '

    @property
    def foot(self) -> str:
        """What stands after the arguments of a call."""
        return "" if self.arguments_key is None else "}"


def _tool(name: str) -> dict[str, Any]:
    properties = {key: {"type": "string", "description": key} for key in _ARGUMENTS}
    parameters = {"type": "object", "properties": properties, "required": list(_ARGUMENTS)}
    function = {"name": name, "description": name, "parameters": parameters}
    return {"type": "function", "function": function}


def _rendered(prompts: Prompts, tools: Sequence[Mapping[str, Any]], count: int) -> tuple[int, str]:
    """Length of the ids that the template takes, and a conversation that ends with calls.

    Raises:
        ApiError: If the template refuses it.
    """
    # Mistral's templates take ids of 9 characters only
    for length in (24, 9):
        calls = [
            {
                "id": str(i) * length,
                "type": "function",
                "function": {"name": name, "arguments": _ARGUMENTS},
            }
            for i, name in enumerate(_NAMES[:count])
        ]
        messages: list[Mapping[str, Any]] = [
            _USER,
            {"role": "assistant", "content": "", "tool_calls": calls},
        ]
        try:
            return length, prompts.text_of_chat(messages, tools, add_generation_prompt=False)
        except ApiError:
            if length == 9:
                raise
    raise AssertionError("unreachable")


def _answer(text: str, prompt: str) -> str:
    """What a conversation has beyond its prompt, which may promise more than is kept."""
    differ = (i for i, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b)
    return text[next(differ, min(len(text), len(prompt))) :]


def _parse(answer: str) -> dict[str, Any] | None:
    """Opener, closer and form of an answer with one call; None where it has another form."""
    before, _, after = answer.partition(_NAMES[0])
    arguments = _WRITTEN_ARGUMENTS.search(after)
    if arguments is None:
        return None
    separator, rest = after[: arguments.start()], after[arguments.end() :]
    begin, key = _OBJECT.search(before), _OBJECT_KEY.fullmatch(separator)
    if begin is not None and key is not None:
        _, end = json.JSONDecoder().raw_decode(answer, begin.start())
        opener, closer = before[: begin.start()], answer[end:]
        return {"opener": opener, "closer": closer, "arguments_key": key[1]}
    # without any text around the name, a call could not be told from an answer
    if not before.strip() or not separator.strip() or _NAMES[0] in after:
        return None
    return {"opener": before, "closer": rest, "arguments_key": None, "separator": separator}


def _between(answer: str, arguments_key: str | None) -> str | None:
    """What stands between two calls; None where the template has left one out."""
    places = [answer.find(name) for name in _NAMES]
    if min(places) < 0:
        return None
    first, second = places
    if arguments_key is None:
        written = _WRITTEN_ARGUMENTS.search(answer, first)
        return None if written is None else answer[written.end() : second]
    starts = [answer.rfind("{", 0, place) for place in places]
    _, end = json.JSONDecoder().raw_decode(answer, starts[0])
    return answer[end : starts[1]]
