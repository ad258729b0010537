"""``/v1/completions``: a prompt is continued."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from cats.serving.answers import Answers, Order, Piece
from cats.serving.errors import refused
from cats.serving.events import event
from cats.serving.fields import AnswerFields, TokenId
from cats.serving.form import Form, Head
from cats.serving.models import ServedModel
from cats.serving.orders import order_of
from cats.serving.tokens import token_text

# OpenAI's own default, of this older route only.
_DEFAULT_NEW_TOKENS = 16


class CompletionRequest(AnswerFields):
    """The body of a request."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(max_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


def order_of_completion(fields: CompletionRequest, served: ServedModel) -> Order:
    """What the engine is asked. Runs in the thread of prompts.

    Raises:
        ApiError: If the request cannot be right.
    """
    prompt = fields.prompt
    first: Any = prompt[0] if isinstance(prompt, list) and prompt else prompt
    if isinstance(first, int):
        ids: list[int] = prompt  # type: ignore[assignment]
    elif isinstance(first, str):
        ids = served.prompts.ids_of_text(first, "prompt")
    else:
        ids = first
    if not ids:
        raise refused("prompt has no tokens: give some text", "prompt")
    if max(ids) >= served.vocabulary:
        raise refused(
            f"prompt: expected token ids below {served.vocabulary}, the model's vocabulary, got "
            f"{max(ids)}",
            "prompt",
        )
    schema = fields.response_format.schema_of_text if fields.response_format else None
    return order_of(
        fields,
        served,
        ids,
        max_tokens=fields.max_tokens or _DEFAULT_NEW_TOKENS,
        param="prompt",
        logprobs=fields.logprobs,
        grammar=None if schema is None else served.grammars.of_schema(schema, "response_format"),
        continues=True,
    )


class CompletionForm(Form):
    """Makes chunks, or one document, of the pieces of answers."""

    def __init__(self, fields: CompletionRequest, served: ServedModel, answers: Answers) -> None:
        super().__init__(served, answers)
        self._head = Head("cmpl", "text_completion", served.id).fields()
        self._wants_logprobs = fields.logprobs is not None
        self._shows_usage = bool(fields.stream_options and fields.stream_options.include_usage)
        self._choices = [_Choice() for _ in range(fields.count)]

    def begin(self) -> bytes:
        return b""

    def add(self, piece: Piece) -> bytes:
        choice: dict[str, Any] = {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish,
        }
        chunk: dict[str, Any] = {**self._head, "choices": [choice]}
        if self._shows_usage:
            chunk["usage"] = None
        if piece.meter is not None:
            chunk["meter"] = piece.meter
        return event(chunk)

    def end(self) -> bytes:
        if not self._shows_usage:
            return b""
        return event({**self._head, "choices": [], "usage": self._answers.usage()})

    def keep(self, piece: Piece) -> None:
        choice = self._choices[piece.index]
        choice.text += piece.text
        choice.finish = piece.finish
        if (logprobs := self._logprobs(piece)) is not None:
            if choice.logprobs is None:
                choice.logprobs = logprobs
            else:
                for name, values in logprobs.items():
                    choice.logprobs[name] += values

    def document(self) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "text": choice.text,
                "logprobs": choice.logprobs,
                "finish_reason": choice.finish,
            }
            for i, choice in enumerate(self._choices)
        ]
        return {**self._head, "choices": choices, "usage": self._answers.usage()}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self._wants_logprobs or not piece.logprobs:
            return None
        choice = self._choices[piece.index]
        texts = [token_text(self._served, token)[0] for token in piece.tokens]
        offsets = []
        for text in texts:
            offsets.append(choice.offset)
            choice.offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [found.chosen for found in piece.logprobs],
            "top_logprobs": [
                {token_text(self._served, token)[0]: value for token, value in found.top}
                for found in piece.logprobs
            ],
            "text_offset": offsets,
        }


class _Choice:
    """One answer."""

    def __init__(self) -> None:
        self.text, self.offset = "", 0
        self.finish: str | None = None
        self.logprobs: dict[str, Any] | None = None
