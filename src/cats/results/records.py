"""One record type for each kind of measured number: its fields, their types and its unit.

A record is one line of a results file. ``value`` is a median, ``low`` and ``high`` are the
quartiles of the ``samples`` that it was taken from, unless the type says otherwise. The fields that
a type adds are the ``settings`` of the line: what was measured, and what was found along with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from cats.errors import FormatError

VERSION = 1
# Stands for a task in the mean over the tasks.
MEAN = "mean"
# Methods whose quality is compared, in the order of tables.
COMPARED = ("dense", "cats", "relu", "input", "teal")
# Of an MLP: what is not ours, and the kernels that the authors of CATS published.
DENSE_MLPS = ("dense_eager", "dense_merged", "dense_compiled")
PAPER_MLP = "paper"
# Of a layer: its launches in their order, and what is traced of a warp, in the order of trace.cuh.
LAUNCHES = ("q, k, v", "attention", "output projection", "MLP")
EVENTS = ("start", "input", "last", "end")

Value = str | int | float | bool | None
# A whole number stays one, so that a line that is read is written again byte for byte.
_Number = int | float
# Marks a field that was found along with the value: two lines of one run that differ in
# nothing else are the same measurement.
_FOUND = "found along with the value"
_Found = Annotated[float, _FOUND]
_MayBeFound = Annotated[float | None, _FOUND]
_FoundCount = Annotated[int, _FOUND]


class Result(BaseModel):
    """What all records have; a record is of one of the types below."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    kinds: ClassVar[dict[tuple[str, str | None], type[Result]]] = {}

    benchmark: str
    quantity: str
    value: _Number
    unit: str
    low: _Number
    high: _Number
    samples: int
    environment: dict[str, Value]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        benchmark, quantity = (cls.model_fields[n].default for n in ("benchmark", "quantity"))
        if not cls.__name__.startswith("_"):
            key = benchmark, quantity if isinstance(quantity, str) else None
            Result.kinds[key] = cls

    @field_validator("environment")
    @classmethod
    def _names_a_device(cls, value: dict[str, Value]) -> dict[str, Value]:
        if not isinstance(value.get("device"), str):
            raise ValueError("names no device")
        return value

    @property
    def device(self) -> str:
        return str(self.environment["device"])

    @property
    def settings(self) -> dict[str, Value]:
        """The fields of its type that were set, as they stand in a file."""
        names = self.model_fields_set - Result.model_fields.keys()
        return {name: getattr(self, name) for name in type(self).model_fields if name in names}

    @property
    def measured(self) -> dict[str, Value]:
        """The settings that say what was measured, without what was found along with it."""
        fields = type(self).model_fields
        return {n: v for n, v in self.settings.items() if _FOUND not in fields[n].metadata}

    def to_json(self) -> str:
        of_all = {n: getattr(self, n) for n in Result.model_fields if n != "environment"}
        return json.dumps(
            {
                "version": VERSION,
                **of_all,
                "settings": self.settings,
                "environment": self.environment,
            },
            allow_nan=False,
        )

    @classmethod
    def of(cls, settings: Mapping[str, Value], **measured: Any) -> Self:
        """A record of this type from settings that come as a mapping.

        Raises:
            FormatError: If a field is missing, unknown or of another type; the message names each.
        """
        if double := settings.keys() & Result.model_fields.keys():
            raise FormatError(f"settings.{min(double)}: unknown")
        try:
            return cls.model_validate({**measured, **settings})
        except ValidationError as error:
            said = "; ".join(_complaint(each, settings, cls) for each in error.errors())
            raise FormatError(said) from error

    @staticmethod
    def from_json(line: str) -> Result:
        """
        Raises:
            FormatError: If the line is no result, is of a newer release, or breaks its schema.
        """
        try:
            fields: dict[str, Any] = json.loads(line)
            version = fields.pop("version")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise FormatError(f"not a result: {line[:80]!r}") from error
        if version != VERSION:
            raise FormatError(f"a result of format {version}; this release reads {VERSION}")
        if "kind" in fields:
            raise FormatError(f"not a result, but part of a file of kind {fields['kind']}")
        benchmark, quantity = (fields.get(name) for name in ("benchmark", "quantity"))
        names = str(benchmark), str(quantity)
        kind = Result.kinds.get(names) or Result.kinds.get((names[0], None))
        settings = fields.pop("settings", None)
        if kind is None or not isinstance(settings, dict):
            raise FormatError(
                f"not a result: no benchmark {benchmark!r} gives a quantity {quantity!r}"
                if kind is None
                else "not a result: settings: missing"
            )
        try:
            return kind.of(settings, **fields)
        except FormatError as error:
            raise FormatError(f"not a result of {benchmark}, {quantity}: {error}") from error


def _complaint(error: Any, settings: Mapping[str, Value], kind: type[Result]) -> str:
    """One fault of a field in words."""
    name = ".".join(str(part) for part in error["loc"][:1])
    of_all = name in Result.model_fields
    inside = name in settings or (name in kind.model_fields and not of_all)
    where = f"settings.{name}" if inside else name
    match error["type"]:
        case "missing":
            return f"{where}: missing"
        case "extra_forbidden":
            return f"{where}: unknown"
        case "literal_error":
            return f"{where}: expected {error['ctx']['expected']}, got {error['input']!r}"
    return f"{where}: {error['msg'].lower()}, got {error['input']!r}"


class _MLP(Result):
    """Of ``cats bench mlp``, one shape."""

    benchmark: Literal["mlp"] = "mlp"
    hidden_size: int
    intermediate_size: int
    dtype: str
    batch: int


class MLPBandwidth(_MLP):
    """How fast the memory is read; ``bytes`` is the size of the read."""

    quantity: Literal["read_bandwidth"] = "read_bandwidth"
    unit: Literal["GB/s"] = "GB/s"
    bytes: _FoundCount


class MLPTime(_MLP):
    """One call of an MLP.

    Attributes:
        variant: A backend, or one of ``DENSE_MLPS``.
        neighbour: What runs between two calls: ``"none"`` or ``"rmsnorm"``.
        sparsity: The target.
        kept_share: Of the neurons, in [0, 1].
        limit_us: Time in which the memory could deliver the bytes.
        copies: Sets of weights that the calls go through, so that no cache holds them.
        calls: In one timed pass.
    """

    quantity: Literal["time"] = "time"
    unit: Literal["us"] = "us"
    variant: str
    neighbour: str
    sparsity: float
    kept_share: _Found
    limit_us: _Found
    copies: _FoundCount
    calls: _FoundCount

    @property
    def limit(self) -> float:
        return self.limit_us


class _Decode(Result):
    """Of ``cats bench decode``: one model, prompt and number of tokens."""

    benchmark: Literal["decode"] = "decode"
    model: str
    batch: int
    prompt_length: int
    new_tokens: int
    dtype: str


class DecodeBandwidth(_Decode):
    """How fast the memory is read, in the same run."""

    quantity: Literal["read_bandwidth"] = "read_bandwidth"
    unit: Literal["GB/s"] = "GB/s"


class _DecodeVariant(_Decode):
    """One way to generate (``variant``) at one target."""

    variant: str
    sparsity: float


class TokenTime(_DecodeVariant):
    """One token after the first.

    Attributes:
        bytes: That a token reads, on average.
        limit_ms: Time in which the memory could deliver them.
        dense_ms: Of the fastest dense loop that was timed in turns; None where there was none.
        kl: Divergence of each step from the model's modules; the four from here on are of our own
            loop alone.
        kl_of_rounding: Divergence of the modules a token at a time from the modules at once.
        same_choice: Share of equal choices.
        sparsity_error: Sparsity above that of the modules.
    """

    quantity: Literal["time"] = "time"
    unit: Literal["ms"] = "ms"
    realized_sparsity: _Found
    bytes: _Found
    limit_ms: _Found
    dense_ms: _MayBeFound = None
    kl: _MayBeFound = None
    kl_of_rounding: _MayBeFound = None
    same_choice: _MayBeFound = None
    sparsity_error: _MayBeFound = None

    @property
    def limit(self) -> float:
        return self.limit_ms

    @property
    def tokens_per_second(self) -> float:
        """Of all rows of the batch."""
        return self.rate(self.value)

    def rate(self, milliseconds: float) -> float:
        """Tokens per second of all rows, where a step takes so long."""
        return self.batch * 1e3 / milliseconds

    @property
    def speedup(self) -> float | None:
        """Over the fastest dense loop that was timed in turns with it, in one run."""
        return None if self.dense_ms is None else self.dense_ms / self.value


class FirstTokenTime(_DecodeVariant):
    """Until the first token; ``dense_ms`` is that of the fastest dense loop of the run."""

    quantity: Literal["time_to_first_token"] = "time_to_first_token"
    unit: Literal["ms"] = "ms"
    dense_ms: _MayBeFound = None


class StartUpTime(_DecodeVariant):
    """From the first call to its third token, with the graphs that were compiled for it."""

    quantity: Literal["start_up"] = "start_up"
    unit: Literal["s"] = "s"
    compilations: _FoundCount


class PeakMemory(_DecodeVariant):
    """Of the device; ``over_dense_weights`` is the share above the dense model's weights."""

    quantity: Literal["peak_memory"] = "peak_memory"
    unit: Literal["B"] = "B"
    over_dense_weights: _Found


class LaunchTime(_DecodeVariant):
    """All calls of one kernel in a step: their number and their share of the step's time."""

    quantity: Literal["launch"] = "launch"
    unit: Literal["us"] = "us"
    kernel: str
    calls: Annotated[_Number, _FOUND]
    share: _Found


class _Model(Result):
    """Of ``cats bench model``; ``prefill`` is the length of the prompt."""

    benchmark: Literal["model"] = "model"
    shape: str
    layers: int
    dtype: str
    sparsity: float
    prefill: int
    new_tokens: int
    variant: str


class PrefillTime(_Model):
    """One pass over the prompt."""

    quantity: Literal["prefill"] = "prefill"
    unit: Literal["ms"] = "ms"


class GenerateRate(_Model):
    """Tokens per second of ``model.generate`` after the first one, with this cache."""

    quantity: Literal["decode"] = "decode"
    unit: Literal["tokens/s"] = "tokens/s"
    cache: str


class Moment(Result):
    """When an event of a launch happens: the median warp, the first (``low``) and the last
    (``high``), after the end of the layer before."""

    benchmark: Literal["timeline"] = "timeline"
    quantity: Literal["moment"] = "moment"
    unit: Literal["us"] = "us"
    model: str
    dtype: str
    sparsity: float
    context: int
    launch: str
    event: str
