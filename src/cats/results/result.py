"""What all records of measured numbers have, and how a line is read and checked.

A record is one line of a results file. ``value`` is a median, ``low`` and ``high`` are the
quartiles of the ``samples`` that it was taken from, unless the type says otherwise. The fields that
a type adds are the ``settings`` of the line: what was measured, and what was found along with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from cats.errors import FormatError

VERSION = 1
Value = str | int | float | bool | None
# A whole number stays one, so that a line that is read is written again byte for byte.
Number = int | float
# Marks a field that was found along with the value: two lines of one run that differ in
# nothing else are the same measurement.
FOUND = "found along with the value"
Found = Annotated[float, FOUND]
MayBeFound = Annotated[float | None, FOUND]
FoundCount = Annotated[int, FOUND]


class Result(BaseModel):
    """What all records have; a record is of one of the types in records.py and quality.py."""

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
        return {n: v for n, v in self.settings.items() if FOUND not in fields[n].metadata}

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
