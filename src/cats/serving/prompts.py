"""Prompts of requests: messages and texts to token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from cats.protocols import Tokenizer
from cats.serving.errors import ApiError, refused

T = TypeVar("T")

TOO_LONG = "context_length_exceeded"


class Prompts:
    """Makes ids of what clients send.

    Long texts take their time, so that it happens in a thread of its own, one request at a time.
    """

    def __init__(self, tokenizer: Tokenizer, *, context: int) -> None:
        """
        Args:
            tokenizer: With the chat template, if the model has one.
            context: Tokens of the longest session.
        """
        self.tokenizer, self._context = tokenizer, context
        # no text of more characters can fit, so that it need not be tokenised to see this
        self._longest_text = context * max(map(len, tokenizer.get_vocab()), default=1)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cats prompts")

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """What a function gives, which runs in the thread of prompts."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def ids_of_text(self, text: str, param: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, begun as the tokenizer begins texts.

        Raises:
            ApiError: If it cannot fit, or has no tokens.
        """
        self._check_length(text, param)
        ids: list[int] = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        if not ids:
            raise refused(f"{param} has no tokens: give some text", param)
        return ids

    def text_of_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Messages in the model's chat template.

        Raises:
            ApiError: If there is no template, or it refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise refused(
                "this model has no chat template: use /v1/completions, or start the server with "
                "--chat-template FILE"
            )
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(variables or {}),
            )
        except Exception as error:  # a template is foreign code, and may raise anything
            reason = str(error).strip().partition("\n")[0][:300]
            raise refused(f"the model's chat template refuses these messages: {reason}") from error
        return text

    def ids_of_chat(self, *arguments: Any, **named: Any) -> list[int]:
        """Token ids of messages; arguments as for :meth:`text_of_chat`.

        Raises:
            ApiError: If there is no template, it refuses the messages, or they cannot fit.
        """
        text = self.text_of_chat(*arguments, **named)
        self._check_length(text, "messages")
        # the template writes what begins a text itself
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise refused("messages have no tokens in the model's chat template", "messages")
        return ids

    def check_fits(self, prompt: int, new: int | None, param: str) -> int:
        """How many new tokens a prompt of so many tokens may have.

        Raises:
            ApiError: If there is no room for the new tokens that were asked for.
        """
        room = self._context - prompt
        if room < (new or 1):
            asked = f" and {new} new ones were asked for" if new else ""
            raise _too_long(
                # LiteLLM knows the error by these words
                f"this model's maximum context length is {self._context} tokens on this server. "
                f"The prompt has {prompt}{asked}: shorten the prompt or ask for fewer new tokens",
                param,
            )
        return room if new is None else new

    def _check_length(self, text: str, param: str) -> None:
        if len(text) > self._longest_text:
            raise _too_long(
                f"this model's maximum context length is {self._context} tokens on this server, "
                f"which a prompt of {len(text)} characters cannot fit: shorten the prompt",
                param,
            )


def _too_long(message: str, param: str) -> ApiError:
    return refused(message, param, TOO_LONG)
