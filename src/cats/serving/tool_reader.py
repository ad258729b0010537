"""Reads calls of tools in text that comes in pieces."""

from __future__ import annotations

import json
import re
import secrets
import string
from dataclasses import dataclass
from typing import Any

from cats.serving.tool_format import ToolFormat

_ALPHABET = string.ascii_letters + string.digits
_NAME = re.compile(r"\s*([\w.-]+)\s*")


@dataclass(frozen=True, slots=True)
class CallPart:
    """A part of a call.

    Attributes:
        index: Number of the call, from 0.
        arguments: More of the JSON text of its arguments.
        id: With the first part of a call.
        name: The same.
    """

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


class ToolReader:
    """Splits an answer into text and calls.

    What looks like a call and is none stays text.

    Attributes:
        calls: How many calls have begun.
    """

    def __init__(self, tool_format: ToolFormat, *, limit: int | None = None) -> None:
        """
        Args:
            tool_format: Of the model's template.
            limit: How many calls are read; what follows is left out. None reads all.
        """
        self._format, self._limit = tool_format, limit
        # models vary the spaces, and the brackets of a list
        self._opener = tool_format.opener.strip().removesuffix("[").rstrip()
        self._closer = tool_format.closer.strip()
        self._between = (tool_format.between or "").strip()
        if self._closer and self._between.startswith(self._closer):
            self._between = ""  # the closer and the next opener
        key = tool_format.arguments_key
        self._header = re.compile(
            _NAME.pattern + re.escape(tool_format.separator.strip()) + r"\s*"
            if key is None
            else rf'\{{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"{key}"\s*:\s*'
        )
        self.calls = 0
        self._buffer = ""
        self._state = self._text if self._opener else self._start
        self._value = _Value()
        self._raw = ""  # of the call that is read, until its name is known

    def add(self, text: str) -> list[str | CallPart]:
        """Take the next text; returns the text and the parts of calls that are certain now."""
        self._buffer += text
        found: list[str | CallPart] = []
        while (part := self._state(False)) is not None:
            if part != "":
                found.append(part)
        return found

    def end(self) -> list[str | CallPart]:
        """What was held back."""
        found: list[str | CallPart] = []
        while (part := self._state(True)) is not None:
            if part != "":
                found.append(part)
        return found

    @property
    def is_full(self) -> bool:
        """Whether as many calls as are wanted have ended."""
        return self._state == self._nothing

    # A state takes what it can from the buffer and gives text or a part of a call, "" where only
    # the state or the buffer has changed, and None where it needs more text.

    def _start(self, ended: bool) -> str | CallPart | None:
        """Without an opener, an answer that begins with an object is a call."""
        text = self._buffer.lstrip()
        if not text:
            return None
        self._state = self._call if text[0] in "{[" else self._text
        return ""

    def _text(self, ended: bool) -> str | CallPart | None:
        buffer = self._buffer
        place = buffer.find(self._opener) if self._opener else -1
        if place >= 0:
            end = place + len(self._opener)
            # spaces before a call are not part of the answer
            text = buffer[:place].rstrip()
            self._state, self._raw, self._buffer = self._call, buffer[len(text) : end], buffer[end:]
            return text
        certain = len(buffer)
        if not ended:
            certain -= _length_of_beginning(buffer, self._opener)
            certain = len(buffer[:certain].rstrip())
        self._buffer = buffer[certain:]
        return buffer[:certain] or None

    def _call(self, ended: bool) -> str | CallPart | None:
        stripped = self._buffer.lstrip()
        if self._raw and stripped.startswith("["):
            stripped = stripped[1:].lstrip()
        header = self._header.match(stripped)
        if header is not None:
            self._buffer, self._raw = stripped[header.end() :], ""
            self._value, self._state = _Value(), self._arguments
            self.calls += 1
            return CallPart(self.calls - 1, "", self._new_id(), header[1])
        whole = self._whole_object(stripped) if stripped.startswith(("{", "[{")) else None
        if whole is not None:
            return whole
        can_be_call = (
            stripped.startswith(("{", "[{")) or not stripped or stripped == "["
            if self._format.arguments_key is not None
            else len(stripped) < 200 and "\n\n" not in stripped
        )
        if can_be_call and not ended:
            return None
        return self._not_a_call()

    def _whole_object(self, text: str) -> str | CallPart | None:
        """A call whose keys stand in another order, once all of it is there."""
        key = self._format.arguments_key
        start = text.find("{")
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            return None
        if key is None or not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return self._not_a_call()
        arguments: Any = value.get(key, {})
        self._buffer, self._raw, self._state = text[end:], "", self._after
        self.calls += 1
        shown = arguments if isinstance(arguments, str) else json.dumps(arguments)
        return CallPart(self.calls - 1, shown, self._new_id(), value["name"])

    def _not_a_call(self) -> str | CallPart | None:
        text, self._raw, self._state = self._raw, "", self._text
        # only the opener is certain to be text; another may follow
        if not text:
            text, self._buffer = self._buffer, ""
        return text or None

    def _arguments(self, ended: bool) -> str | CallPart | None:
        if not self._value.begun:
            self._buffer = self._buffer.lstrip()
        count = self._value.take(self._buffer)
        text, self._buffer = self._buffer[:count], self._buffer[count:]
        if self._value.ended:
            self._state = self._foot if self._format.arguments_key is not None else self._after
            self._object = _Value(depth=1)
        if self._value.is_string:
            # some models write the arguments as text
            self._raw += text
            if not self._value.ended:
                return None
            text, self._raw = _decoded(self._raw), ""
        if text:
            return CallPart(self.calls - 1, text)
        return "" if self._value.ended else None

    def _foot(self, ended: bool) -> str | CallPart | None:
        """Up to the end of the object of a call, which may have more keys."""
        count = self._object.take(self._buffer)
        self._buffer = self._buffer[count:]
        if not self._object.ended:
            return None
        self._state = self._after
        return ""

    def _after(self, ended: bool) -> str | CallPart | None:
        if self._limit is not None and self.calls >= self._limit:
            self._state = self._nothing
            return ""
        text = self._buffer.lstrip()
        marks = [(self._between, self._call), (self._closer, self._text)]
        for mark, state in marks:
            if mark and text.startswith(mark):
                self._buffer, self._state = text[len(mark) :], state
                return ""
        if not ended and any(mark.startswith(text) for mark, _ in marks if mark):
            return None
        self._state = self._text
        return ""

    def _nothing(self, ended: bool) -> str | CallPart | None:
        self._buffer = ""
        return None

    def _new_id(self) -> str:
        length = self._format.id_length
        prefix = "call_" if length > len("call_") + 9 else ""
        random = "".join(secrets.choice(_ALPHABET) for _ in range(length - len(prefix)))
        return prefix + random


class _Value:
    """Finds the end of a JSON value in text that comes in pieces.

    Attributes:
        begun: Whether its first character has come.
        ended: Whether all of it has come.
        is_string: Whether the value is a string.
    """

    def __init__(self, depth: int = 0) -> None:
        """
        Args:
            depth: Of the brackets that are open where the text begins.
        """
        self._depth, self._in_string, self._escaped = depth, False, False
        self.begun = depth > 0
        self.ended = self.is_string = False

    def take(self, text: str) -> int:
        """How many characters of the text belong to the value."""
        for i, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
                    self.ended = self._depth == 0
            elif character == '"':
                self._in_string = True
                self.is_string = self.is_string or not self.begun
            elif character in "{[":
                self._depth += 1
            elif character in "}]" and self._depth:
                self._depth -= 1
                self.ended = self._depth == 0
            elif self._depth == 0 and (character in ",}]" or character.isspace()):
                # the end of a number or a word, which nothing else shows
                self.ended = True
                return i
            self.begun = True
            if self.ended:
                return i + 1
        return len(text)


def _decoded(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, str) else text


def _length_of_beginning(text: str, string: str) -> int:
    """Length of the longest end of a text with which a string begins."""
    for length in range(min(len(string) - 1, len(text)), 0, -1):
        if string.startswith(text[-length:]):
            return length
    return 0
