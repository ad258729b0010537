"""How fast a token would be with some masks, from what ``cats bench costs`` measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from cats import fingerprint
from cats.errors import ConfigError, DataError
from cats.results import MaskTime, TokenCost, environment, read_results
from cats.weights.placement import input_device


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """A linear model of the time of a token, measured on one device with one model.

    Attributes:
        token_ms: Time of a token of the dense model.
        saved_ms: Kind of mask to the time that a token saves if the mask drops everything.
    """

    token_ms: float
    saved_ms: dict[str, float]

    @classmethod
    def load(cls, path: Path, model: nn.Module) -> Costs:
        """Read a file of ``cats bench costs``.

        Raises:
            StorageError: If it cannot be read.
            FormatError: If it holds something else.
            DataError: If it lacks a mask, or is of another model or device.
        """
        results = read_results(path)
        tokens = [r for r in results if isinstance(r, TokenCost)]
        masks = [r for r in results if isinstance(r, MaskTime)]
        whole = [r.value for r in masks if r.mask == "none"]
        kinds = {r.mask for r in masks} - {"none"}
        if not tokens or not whole or not kinds:
            raise DataError(f"{path}: holds no costs of masks: make it with cats bench costs")
        device = str(environment(str(input_device(model)))["device"])
        if tokens[-1].device != device or tokens[-1].weights != fingerprint.of_model(model):
            measured = f"{tokens[-1].model} in {tokens[-1].dtype} on {tokens[-1].device}"
            raise DataError(
                f"{path}: costs of {measured}, not of this model on {device}: run cats bench costs "
                "again"
            )
        saved = {}
        for kind in sorted(kinds):
            # least squares through nothing saved at nothing dropped
            pairs = [(r.dropped, whole[-1] - r.value) for r in masks if r.mask == kind]
            saved[kind] = sum(d * s for d, s in pairs) / sum(d * d for d, _ in pairs)
        return cls(token_ms=tokens[-1].value, saved_ms=saved)

    def speedup(self, dropped: Mapping[str, float]) -> float:
        """How many times as fast as the dense model a token is.

        Args:
            dropped: Kind of mask to the mean share of its entries that is dropped.

        Raises:
            ConfigError: If there is no cost of such a mask.
        """
        if missing := dropped.keys() - self.saved_ms.keys():
            raise ConfigError(
                f"no kernel skips {min(missing)!r}, so that no speed can be aimed at: give --bytes"
            )
        saved = sum(self.saved_ms[kind] * share for kind, share in dropped.items())
        return self.token_ms / (self.token_ms - saved)


def least_percent(speedup_at: Callable[[int], float], *, speed: float, most: int, unit: str) -> int:
    """The smallest percentage that is skipped and gives a speed.

    Args:
        speedup_at: Speed at a percentage, rising with it.
        speed: How many times as fast as the dense model.
        most: The largest percentage.
        unit: What the percentage is of, for messages.

    Raises:
        ConfigError: If even the largest percentage is slower.
    """
    if (reached := speedup_at(most)) < speed:
        raise ConfigError(
            f"{speed:g} times the dense speed cannot be met: {most} % {unit} gives {reached:.2f} "
            "times on this device"
        )
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if speedup_at(middle) >= speed else (middle, high)
    return high
