"""A profile as a file holds it: what the activations of a model's layers look like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cats.errors import FormatError
from cats.results.result import Value
from cats.storage import load_json

_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class LayerRecord(BaseModel):
    """One activation module; :class:`cats.evaluation.profile.Layer` says what the fields mean."""

    model_config = _STRICT

    name: str
    activation: str
    threshold: float | None
    zero: float
    near_zero: float
    histogram: list[float]
    by_position: list[float]
    union: dict[str, float]
    overlap: float | None


class ProfileRecord(BaseModel):
    """What ``cats profile -o`` wrote.

    Attributes:
        model: Name of the model.
        text: Name of the text.
        cats: The model's ``cats`` block; None of a dense one.
        settings: What the file depends on, if a later run may use it again.
        layers: In the order of the model.
        tokens: How many tokens were seen.
        block: Tokens in each block of the text.
        bos: Whether a beginning-of-sequence token begins each block.
        near: Magnitude below which an output counts as near zero.
        by_token: Quantiles over the tokens of the share of zeros in all layers.
        read: Kind of mask to what rows that are decoded together read of its entries, by their
            number; missing in older files.
    """

    model_config = _STRICT

    model: str
    text: str
    block: int | None = None
    bos: bool | None = None
    cats: dict[str, Any] | None = None
    settings: dict[str, Value] | None = None
    layers: list[LayerRecord]
    tokens: int
    near: float
    by_token: dict[str, float]
    read: dict[str, dict[str, float]] = {}

    @classmethod
    def load(cls, path: Path) -> ProfileRecord:
        """
        Raises:
            StorageError: If the file cannot be read.
            FormatError: If it is no profile, or a field is missing, unknown or of another type.
        """
        fields = load_json(path, "profile")
        try:
            record = {name: fields[name] for name in fields.keys() - {"version", "kind"}}
            return cls.model_validate(record)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise FormatError(f"{path}: {where}: {first['msg'].lower()}") from error
