"""Tokens as text and bytes, and their log probabilities in OpenAI's forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cats.decode.rows.logprobs import TokenLogprobs
from cats.serving.models import ServedModel


def chat_logprobs(
    served: ServedModel, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> list[dict[str, Any]]:
    """Entries of ``logprobs.content``."""
    return [
        _entry(served, token, found.chosen)
        | {"top_logprobs": [_entry(served, other, value) for other, value in found.top]}
        for token, found in zip(tokens, logprobs, strict=True)
    ]


def token_text(served: ServedModel, token: int) -> tuple[str, bytes]:
    """Text and bytes of a token by itself; a part of a character has no text of its own."""
    raw: bytes = served.grammars.tokenizer.decode_bytes([token])
    return raw.decode(errors="replace"), raw


def _entry(served: ServedModel, token: int, logprob: float) -> dict[str, Any]:
    text, raw = token_text(served, token)
    return {"token": text, "logprob": logprob, "bytes": list(raw)}
