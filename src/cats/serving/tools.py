"""Which tools an answer may call, and in which form."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cats.protocols import Tokenizer
from cats.serving.errors import refused
from cats.serving.messages import Function, NamedTool
from cats.serving.models import ServedModel
from cats.serving.tool_format import ToolFormat

if TYPE_CHECKING:
    from cats.serving.chat import ChatRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolUse:
    """Tools of one request.

    Attributes:
        format: How the model's template writes calls.
        for_template: The tools as the template takes them.
        grammar: What an answer has to follow where it must call a tool, in llguidance's form of
            Lark; None where it may be any text.
        specials: Special tokens whose text is part of a call.
    """

    format: ToolFormat
    for_template: list[dict[str, Any]]
    grammar: str | None
    specials: frozenset[int]

    @classmethod
    def of(cls, fields: ChatRequest, served: ServedModel) -> ToolUse | None:
        """The tools of a request; None where it may call none.

        Raises:
            ApiError: If the choice names none of them, or the model's template knows no tools.
        """
        choice = fields.tool_choice
        if not fields.tools:
            if choice not in (None, "none"):
                raise refused("tool_choice is only allowed where tools are given", "tool_choice")
            return None
        functions = [tool.function for tool in fields.tools]
        names = [function.name for function in functions]
        if len(set(names)) < len(names):
            raise refused("tools: two functions have the same name", "tools")
        if choice == "none":
            return None
        tool_format = served.tool_format
        for_template = [tool.for_template() for tool in fields.tools]
        if isinstance(choice, NamedTool):
            functions = [f for f in functions if f.name == choice.function.name]
            if not functions:
                raise refused(
                    f"tool_choice names {choice.function.name}, which is none of the tools: "
                    f"{', '.join(names)}",
                    "tool_choice",
                )
        forced = choice == "required" or isinstance(choice, NamedTool)
        strict = any(function.strict for function in functions)
        if strict and not forced and not tool_format.opener.strip():
            raise refused(
                "tools: strict cannot be followed with tool_choice auto, since nothing in this "
                "model's chat template tells the beginning of a call from other text; leave strict "
                "out, or require a call",
                "tools",
            )
        grammar = None
        if forced or strict:
            single = fields.parallel_tool_calls is False or isinstance(choice, NamedTool)
            grammar = grammar_of(
                tool_format, functions, served.tokenizer, single=single, forced=forced
            )
        marks = tool_format.opener, tool_format.separator, tool_format.between, tool_format.closer
        specials = _special_tokens(served.tokenizer)
        text = "".join(mark or "" for mark in marks)
        shown = {token for content, token in specials.items() if content in text}
        return cls(
            format=tool_format,
            for_template=for_template,
            grammar=grammar,
            specials=frozenset(shown),
        )


def grammar_of(
    tool_format: ToolFormat,
    functions: Sequence[Function],
    tokenizer: Tokenizer,
    *,
    single: bool,
    forced: bool,
) -> str:
    """Answers whose calls are calls of these functions, with arguments as their schemas say.

    Args:
        tool_format: Of the model's template.
        functions: Those that may be called.
        tokenizer: Its special tokens are single tokens in the grammar.
        single: Whether there is one call at most.
        forced: Whether the answer is a call. Otherwise it is any text, with or without calls.
    """
    specials = _special_tokens(tokenizer)
    between = tool_format.between
    repeated = "" if single or between is None else f"({_literal(between, specials)} call)*"
    closer = _literal(tool_format.closer.rstrip(), specials)
    lines = ["%llguidance {}"]
    if forced:
        opener = _literal(tool_format.opener.lstrip(), specials)
        lines.append(f"start: {opener} call {repeated} {closer}")
    else:
        core = tool_format.opener.strip()
        rest = tool_format.opener.lstrip()[len(core) :]
        special = next((name for name in specials if core.startswith(name)), None)
        if special is not None:
            begin, rest = f"TEXT <[{specials[special]}]>", core[len(special) :] + rest
        else:
            begin = "begin"
            lines.append(f"begin[lazy]: TEXT {_literal(core, {})}")
        calls = f"{begin} {_literal(rest, specials)} call {repeated} {closer}"
        lines += [f"start: ({calls})* end", "end: TEXT", r"TEXT: /(.|\n)*/"]
    lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        schema = json.dumps(function.schema_of_arguments)
        head = _literal(tool_format.head(function.name), specials)
        lines.append(f"call_{i}: {head} %json {schema} {_literal(tool_format.foot, specials)}")
    return "\n".join(lines) + "\n"


def _literal(text: str, specials: Mapping[str, int]) -> str:
    """A text in Lark, with single tokens for the special ones."""
    if not text:
        return ""
    pattern = "(" + "|".join(map(re.escape, specials)) + ")" if specials else r"(?!)"
    return " ".join(
        f"<[{specials[part]}]>" if part in specials else json.dumps(part, ensure_ascii=False)
        for part in re.split(pattern, text)
        if part
    )


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Text of each special token and its id, the longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found = {content.content: token for token, content in added.items() if content.special}
    return dict(sorted(found.items(), key=lambda pair: -len(pair[0])))
