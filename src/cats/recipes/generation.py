"""Answer one prompt, and time it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cats.decode import Decoder
from cats.decode.text import Detokenizer
from cats.errors import DataError
from cats.protocols import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The answer of a model.

    Attributes:
        text: The text, without the prompt and special tokens.
        new_tokens: Number of its tokens.
        engine: Engine that decoded it.
        tokens_per_second: Speed after the first token, so that the pass over the prompt is left
            out; 0 if there is only one token.
    """

    text: str
    new_tokens: int
    engine: str
    tokens_per_second: float


def answer(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    chat: bool = True,
    engine: str = "auto",
    on_text: Callable[[str], object] | None = None,
    on_token: Callable[[], object] | None = None,
    **options: Any,
) -> Answer:
    """Continue one prompt.

    Args:
        model: A model, on its device.
        tokenizer: Its tokenizer.
        prompt: The text to continue or to answer.
        chat: Put the prompt into the tokenizer's chat template, if it has one.
        engine: As for :func:`cats.generate`.
        on_text: Called with each piece of text. Joined, the pieces are the text of the answer.
        on_token: Called after each token.
        **options: As for :func:`cats.generate`.

    Raises:
        DataError: If the prompt has no tokens.
    """
    ids = encode(tokenizer, prompt, chat=chat)
    text = Detokenizer(tokenizer, skip_special_tokens=True)
    times: list[float] = []

    def stamp(tokens: Tensor) -> None:
        times.append(time.perf_counter())
        if on_text is not None:
            on_text(text.add(tokens.tolist()))
        if on_token is not None:
            on_token()

    decoder = Decoder(model, engine=engine)
    output = decoder.generate(ids, callback=stamp, tokenizer=tokenizer, **options)
    if on_text is not None:
        on_text(text.end())
    return Answer(
        text=tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True),
        new_tokens=len(times),
        engine=decoder.engine,
        tokens_per_second=tokens_per_second(times),
    )


def tokens_per_second(times: Sequence[float]) -> float:
    """Speed after the first token; 0 if there is only one token.

    Args:
        times: Time of each token, in seconds.
    """
    seconds = times[-1] - times[0]
    return (len(times) - 1) / seconds if seconds > 0 else 0.0


def encode(tokenizer: Tokenizer, prompt: str, *, chat: bool) -> Tensor:
    """Token ids ``[1, T]`` of a prompt, in the chat template if the tokenizer has one.

    Raises:
        DataError: If the prompt has no tokens.
    """
    ids: Tensor
    if chat and tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise DataError("the prompt has no tokens: give some text")
    return ids
