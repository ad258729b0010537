"""Fields of requests: what is checked, what is refused by name, and what has no effect here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

# Names of fields, each with the values that ask for nothing.
Refused: TypeAlias = Mapping[str, tuple[object, ...]]

# Names in OpenAI's or other servers' APIs that would change the answer, with the values that do
# not. None changes nothing for each.
REFUSED: Refused = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "function_call": (),
    "functions": (),
    "guided_json": (),
    "length_penalty": (1, 1.0),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
_ADVICE: Mapping[str, str] = {
    "best_of": "ask for n answers, and choose",
    "chat_template": "start the server with --chat-template FILE",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "guided_json": "use response_format",
    "store": "this server keeps no answers; leave it out",
    "structured_outputs": "use response_format",
}
_MAX_STOPS = 16
Stop = Annotated[str, Field(min_length=1, max_length=512)]
TokenId = Annotated[int, Field(ge=0)]


class Fields(BaseModel):
    """A JSON object of a request. Unknown names are refused, and so is what we do not do."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    refused: ClassVar[Refused] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_refused(cls, values: Any) -> Any:
        """Leave out names that ask for nothing, and refuse those that do.

        Raises:
            PydanticCustomError: If a value asks for what this server does not do.
        """
        if not isinstance(values, dict):
            return values
        for name in cls.refused.keys() & values.keys():
            value = values[name]
            # 1 == True, but they are not the same value
            neutral = any(type(v) is type(value) and v == value for v in cls.refused[name])
            if value is not None and not neutral:
                advice = _ADVICE.get(name, "leave it out")
                raise PydanticCustomError(
                    "unsupported",
                    "{name} is not supported by this server: {advice}",
                    {"name": name, "advice": advice},
                )
        return {name: value for name, value in values.items() if name not in cls.refused}


class StreamOptions(Fields):
    """What a stream holds beside the answer.

    Attributes:
        include_usage: A last chunk with the numbers of tokens.
        include_meter: Speed and share of weights in chunks; of this server only.
    """

    refused: ClassVar[Refused] = {"include_obfuscation": (False,)}

    include_usage: bool = False
    include_meter: bool = False


class JsonSchema(Fields):
    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    # a name of pydantic's own methods
    schema_: Annotated[dict[str, Any] | bool | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Fields):
    """The form of the text."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(
                "json_schema", "json_schema goes with the type json_schema, and is needed there"
            )
        return self

    @property
    def schema_of_text(self) -> dict[str, Any] | bool | None:
        """The JSON schema of the text; None for any text."""
        if self.type == "text":
            return None
        if self.json_schema is None:
            return {"type": "object"}
        return True if self.json_schema.schema_ is None else self.json_schema.schema_


class AnswerFields(Fields):
    """What requests for text have in common; names beyond OpenAI's are those of vLLM."""

    refused: ClassVar[Refused] = REFUSED

    model: str
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=_MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    # without effect on the answer
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> AnswerFields:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options", "stream_options is only allowed where stream is true"
            )
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def count(self) -> int:
        return self.n or 1


def first_problem(errors: Sequence[Any]) -> tuple[str, str | None]:
    """Message and field of the first thing that pydantic found wrong.

    Args:
        errors: Of ``ValidationError.errors()`` or ``RequestValidationError.errors()``.
    """
    # of a union, pydantic lists what is wrong with each of its types
    error = errors[0]
    place = [str(part) for part in error["loc"] if part != "body"]
    param = ".".join(place) or None
    kind = error["type"]
    if kind == "extra_forbidden":
        return f"Unrecognized request argument supplied: {param}", param
    if kind == "json_invalid":
        reason = error.get("ctx", {}).get("error", "")
        return f"the body of the request is no JSON: {reason}", None
    if kind == "missing":
        where = "a JSON object as body" if param is None else param
        return f"you must provide {where}", param
    if kind == "unsupported":
        return error["msg"], ".".join([*place, error["ctx"]["name"]])
    return (f"{param}: {error['msg']}" if param else error["msg"]), param
