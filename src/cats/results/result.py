"""What all records of measured numbers have, and how a line is read and checked.

A record is one line of a results file. ``value`` is a median, ``low`` and ``high`` are the
quartiles of the ``samples`` that it was taken from, unless the type says otherwise. The fields that
a type adds are the ``settings`` of the line: what was measured, and what was found along with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from cats.errors import FormatError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

VERSION = 1
Value = str | int | float | bool | None
# An integer stays an integer, so that a line that is read is written again byte for byte.
Number = int | float
# Marks a field that was measured along with the value. Two lines of one run that differ in
# such fields only are the same measurement.
FOUND = "found along with the value"
Found = Annotated[float, FOUND]
MayBeFound = Annotated[float | None, FOUND]
FoundCount = Annotated[int, FOUND]


class Result(BaseModel):
    """What all records have. Their types are in records.py and quality.py.

    A type that names its benchmark and its unit can stand in a file. The others are bases.

    Attributes:
        kinds: Benchmark and quantity to the type of their records. The quantity is None where the
            benchmark has one type for all its quantities.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    kinds: ClassVar[dict[tuple[str, str | None], type[Result]]] = {}

    benchmark: str
    quantity: str
    value: Number
    unit: str
    low: Number
    high: Number
    samples: int
    environment: dict[str, Value]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: object) -> None:
        names = ("benchmark", "quantity", "unit")
        benchmark, quantity, unit = (cls.model_fields[name].default for name in names)
        if isinstance(benchmark, str) and isinstance(unit, str):
            Result.kinds[benchmark, quantity if isinstance(quantity, str) else None] = cls

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
        """The fields that the type adds and that were set, as they stand in a file."""
        names = self.model_fields_set - Result.model_fields.keys()
        return {name: getattr(self, name) for name in type(self).model_fields if name in names}

    @property
    def measured(self) -> dict[str, Value]:
        """The settings that say what was measured, without what was found along with it."""
        fields = type(self).model_fields
        settings = self.settings.items()
        return {name: value for name, value in settings if FOUND not in fields[name].metadata}

    def to_json(self) -> str:
        common = {name: getattr(self, name) for name in Result.model_fields}
        environment = common.pop("environment")
        line = {"version": VERSION, **common, "settings": self.settings, "environment": environment}
        return json.dumps(line, allow_nan=False)

    @classmethod
    def of(cls, settings: Mapping[str, Value], **measured: object) -> Self:
        """A record of this type from settings that come as a mapping.

        Raises:
            FormatError: If a field is missing, unknown or of another type; the message names each.
        """
        if common := settings.keys() & Result.model_fields.keys():
            raise FormatError(f"settings.{min(common)}: unknown")
        try:
            return cls.model_validate({**measured, **settings})
        except ValidationError as error:
            faults = "; ".join(_describe(fault, settings, cls) for fault in error.errors())
            raise FormatError(faults) from error

    @staticmethod
    def from_json(line: str) -> Result:
        """
        Raises:
            FormatError: If the line is no result, is of a newer release, or breaks its schema.
        """
        try:
            fields: dict[str, object] = json.loads(line)
            version = fields.pop("version")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise FormatError(f"not a result: {line[:80]!r}") from error
        if version != VERSION:
            raise FormatError(f"a result of format {version}; this release reads {VERSION}")
        if "kind" in fields:
            raise FormatError(f"not a result, but part of a file of kind {fields['kind']}")
        benchmark, quantity = (fields.get(name) for name in ("benchmark", "quantity"))
        kinds = Result.kinds
        kind = kinds.get((str(benchmark), str(quantity))) or kinds.get((str(benchmark), None))
        settings = fields.pop("settings", None)
        if kind is None:
            raise FormatError(
                f"not a result: no benchmark {benchmark!r} gives a quantity {quantity!r}"
            )
        if not isinstance(settings, dict):
            raise FormatError("not a result: settings: missing")
        try:
            return kind.of(settings, **fields)
        except FormatError as error:
            raise FormatError(f"not a result of {benchmark}, {quantity}: {error}") from error


class ModelResult(Result):
    """Base of what is measured of one model."""

    model: str
    dtype: str


def _describe(fault: ErrorDetails, settings: Mapping[str, Value], kind: type[Result]) -> str:
    name = ".".join(str(part) for part in fault["loc"][:1])
    own_field = name in kind.model_fields and name not in Result.model_fields
    field = f"settings.{name}" if own_field or name in settings else name
    match fault["type"]:
        case "missing":
            return f"{field}: missing"
        case "extra_forbidden":
            return f"{field}: unknown"
        case "literal_error":
            return f"{field}: expected {fault['ctx']['expected']}, got {fault['input']!r}"
    return f"{field}: {fault['msg'].lower()}, got {fault['input']!r}"
