"""Records of ``cats bench serve``: the server beside its engine alone, timed in turns."""

from __future__ import annotations

from typing import Literal

from cats.results.result import Found, Result


class ServingResult(Result):
    """Base: one model, and a number of streams at a time.

    Attributes:
        target: Target of its thresholds; 0 for a dense model.
        streams: Answers that decode together.
    """

    benchmark: Literal["serve"] = "serve"
    model: str
    target: float
    dtype: str
    streams: int
    prompt_length: int
    new_tokens: int


class ServedRate(ServingResult):
    """Tokens of all streams per second, from the first request to the last token.

    Attributes:
        by: ``"engine"`` for sessions in the process, ``"server"`` for streams over HTTP.
    """

    quantity: Literal["rate"] = "rate"
    unit: Literal["tokens/s"] = "tokens/s"
    by: str


class ServingOverhead(ServingResult):
    """By how much longer the server takes than the engine did just before, in percent."""

    quantity: Literal["overhead"] = "overhead"
    unit: Literal["%"] = "%"


class ServedFirstToken(ServingResult):
    """From a request to its first token over HTTP, of all streams of all rounds.

    Attributes:
        p95: The time that 95 of 100 streams stay below.
        p99: The same of 99.
    """

    quantity: Literal["time_to_first_token"] = "time_to_first_token"
    unit: Literal["ms"] = "ms"
    p95: Found
    p99: Found
