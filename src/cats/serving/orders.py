"""Fields of a request to what the engine is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llguidance

from cats.serving.answers import Order, ScoreFunction
from cats.serving.errors import refused
from cats.serving.fields import AnswerFields
from cats.serving.models import ServedModel
from cats.serving.scores import Bias, Penalties

# Below it, the likeliest token is as good as certain, and scores divided by it could overflow.
_LEAST_TEMPERATURE = 1e-4


def order_of(
    fields: AnswerFields,
    served: ServedModel,
    ids: list[int],
    *,
    max_tokens: int | None,
    param: str,
    logprobs: int | None = None,
    grammar: tuple[str, str] | None = None,
    continues: bool = False,
    shown_specials: frozenset[int] = frozenset(),
) -> Order:
    """The order of one prompt.

    Args:
        fields: Of the request.
        served: The model that it names.
        ids: Token ids of the prompt.
        max_tokens: New tokens at most; None for all that fit.
        param: The field that holds the prompt.
        logprobs: As for :class:`Order`.
        grammar: A grammar that the text has to follow, and the field that it comes from.
        continues: As for :class:`Order`.
        shown_specials: As for :class:`Order`.

    Raises:
        ApiError: If the order cannot be right.
    """
    new = served.prompts.check_fits(len(ids), max_tokens, param)
    ends = () if fields.ignore_eos else served.ends
    further = tuple(fields.stop_token_ids or ())
    _check_tokens(further, served, "stop_token_ids")
    options = _sampling(fields, served)
    options |= {"max_new_tokens": new, "eos_token_id": [*ends, *further] or None}
    if fields.stops:
        options["stop_strings"] = list(fields.stops)
    if fields.min_tokens:
        if fields.min_tokens > new:
            raise refused(
                f"min_tokens: expected at most the {new} new tokens that there may be, got "
                f"{fields.min_tokens}",
                "min_tokens",
            )
        options["min_new_tokens"] = fields.min_tokens
    matcher = None
    if grammar is not None:
        for name in ("ignore_eos", "min_tokens"):
            if getattr(fields, name):
                raise refused(f"{name} cannot be used together with {grammar[1]}", name)
        matcher = served.grammars.matcher(*grammar)
    return Order(
        ids=ids,
        options=options,
        count=fields.count,
        seed=None if fields.seed is None else fields.seed % 2**63,
        stops=fields.stops,
        logprobs=logprobs,
        processors=_processors(fields, served, len(ids), matcher),
        metered=bool(fields.stream_options and fields.stream_options.include_meter),
        continues=continues,
        shown_specials=shown_specials,
    )


def _sampling(fields: AnswerFields, served: ServedModel) -> dict[str, Any]:
    chosen = dict(served.defaults)
    for name in ("temperature", "top_p", "top_k", "min_p"):
        if (value := getattr(fields, name)) is not None:
            chosen[name] = value
    options: dict[str, Any] = {"do_sample": chosen["temperature"] >= _LEAST_TEMPERATURE}
    if options["do_sample"]:
        # vLLM says -1 for all tokens
        options |= chosen | {"top_k": max(0, chosen["top_k"])}
    if fields.repetition_penalty is not None:
        options["repetition_penalty"] = fields.repetition_penalty
    return options


def _processors(
    fields: AnswerFields,
    served: ServedModel,
    prompt_length: int,
    matcher: llguidance.LLMatcher | None,
) -> Callable[[], list[ScoreFunction]]:
    biases = _biases(fields, served)
    presence, frequency = fields.presence_penalty or 0.0, fields.frequency_penalty or 0.0

    def make() -> list[ScoreFunction]:
        made: list[ScoreFunction] = []
        if presence or frequency:
            made.append(
                Penalties(presence=presence, frequency=frequency, prompt_length=prompt_length)
            )
        if biases:
            made.append(Bias(biases))
        if matcher is not None:
            made.append(served.grammars.mask(matcher, prompt_length))
        return made

    return make


def _biases(fields: AnswerFields, served: ServedModel) -> dict[int, float]:
    biases = {}
    for name, value in (fields.logit_bias or {}).items():
        if not (name.isascii() and name.isdecimal() and len(name) < 10):
            raise refused(
                f"logit_bias: expected token ids as names, got {name[:40]!r}", "logit_bias"
            )
        biases[int(name)] = value
    _check_tokens(biases, served, "logit_bias")
    return biases


def _check_tokens(tokens: Any, served: ServedModel, param: str) -> None:
    for token in tokens:
        if token >= served.vocabulary:
            raise refused(
                f"{param}: expected token ids below {served.vocabulary}, the model's vocabulary, "
                f"got {token}",
                param,
            )
