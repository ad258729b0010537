"""The result of calibration: the thresholds of each layer, and their origin."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cats.errors import ConfigError, FormatError
from cats.storage import (
    FORMAT_VERSION,
    MASKS_VERSION,
    check_version,
    load_tensors,
    save_tensors,
)
from cats.version import __version__

_FINGERPRINT = "fingerprint"
_INPUTS = "input_threshold"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CatsConfig:
    """Thresholds of a sparse model and their origin.

    Attributes:
        method: Name of the method that set them, such as ``"cats"``.
        router: The branch that decides: all of its weights are read, and its outputs are compared
            with the threshold; ``"gate"`` or ``"up"``.
        target_sparsity: Fraction of neurons that calibration aimed to drop; None where the method
            has no target (``"relu"``).
        tensors: Name of each sparse MLP, such as ``"model.layers.0.mlp"``, to its named float32
            tensors. ``"threshold"`` is always there: one number, ``[F]``, or ``[E, 1]``, one per
            expert.
        inputs: Name of a linear layer to the thresholds of its inputs, ``[columns]``, float32: an
            input ``x[d]`` is dropped where ``abs(x[d])`` is smaller. The inputs of down are the
            products of both branches of an MLP.
        target_bytes: Share of the bytes of masked layers that calibration aimed to read; None where
            it aimed at a sparsity, or had no target.
        release: Of this library, which wrote it; None in files without ``inputs``.
        realized_sparsity: Name of each MLP to the fraction dropped on the calibration tokens.
        calibration_tokens: Number of calibration tokens.
        calibration_hash: Hash of the calibration blocks, independent of their order.
        fingerprints: Name of each MLP to a few of its weights, float32. They show whether
            thresholds belong to a model.
    """

    method: str
    router: str = "gate"
    target_sparsity: float | None
    tensors: dict[str, dict[str, Tensor]]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    target_bytes: float | None = None
    release: str | None = None
    realized_sparsity: dict[str, float] = field(default_factory=dict)
    calibration_tokens: int = 0
    calibration_hash: str = ""
    fingerprints: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_target(self.target_sparsity)
        check_target(self.target_bytes, "share of bytes")
        if not self.tensors:
            raise ConfigError("a config needs the threshold of at least one MLP, got none")
        for mlp, tensors in self.tensors.items():
            if "threshold" not in tensors:
                raise ConfigError(f"{mlp}: expected a tensor named threshold, got {[*tensors]}")
            for name, tensor in tensors.items():
                is_column = tensor.ndim == 2 and tensor.shape[1] == 1
                if tensor.dtype != torch.float32 or not (tensor.ndim < 2 or is_column):
                    raise ConfigError(
                        f"{mlp}.{name}: expected float32, one number, [F], or [E, 1] for experts; "
                        f"got {tensor.dtype} {list(tensor.shape)}"
                    )
            if not (tensors["threshold"] >= 0).all():
                raise ConfigError(f"{mlp}: a threshold is negative or NaN")
        for layer, tensor in self.inputs.items():
            if tensor.dtype != torch.float32 or tensor.ndim != 1:
                raise ConfigError(
                    f"{layer}.{_INPUTS}: expected float32, one number for each input; "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
            if not (tensor >= 0).all():
                raise ConfigError(f"{layer}: a threshold of its inputs is negative or NaN")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CatsConfig):
            return NotImplemented
        mine, theirs = self._flat(), other._flat()
        return (self.to_dict(), mine.keys()) == (other.to_dict(), theirs.keys()) and all(
            torch.equal(tensor, theirs[name]) for name, tensor in mine.items()
        )

    @property
    def thresholds(self) -> dict[str, Tensor]:
        """Name of each sparse MLP to its threshold: one number, ``[F]`` or ``[E, 1]``."""
        return {mlp: tensors["threshold"] for mlp, tensors in self.tensors.items()}

    def to_dict(self) -> dict[str, Any]:
        """The small ``cats`` block of ``config.json``; tensors are stored beside the weights."""
        block = {
            "version": FORMAT_VERSION,
            "method": self.method,
            "router": self.router,
            "target_sparsity": self.target_sparsity,
            "realized_sparsity": {n: round(s, 5) for n, s in self.realized_sparsity.items()},
            "calibration_tokens": self.calibration_tokens,
            "calibration_hash": self.calibration_hash,
        }
        if self.inputs or self.target_bytes is not None:
            block |= {
                "version": MASKS_VERSION,
                "target_bytes": self.target_bytes,
                "masked_layers": len(self.inputs),
                "release": __version__,
            }
        return block

    @classmethod
    def from_dict(
        cls,
        block: dict[str, Any],
        tensors: dict[str, dict[str, Tensor]],
        *,
        inputs: dict[str, Tensor] | None = None,
        fingerprints: dict[str, Tensor] | None = None,
        source: str = "cats block",
    ) -> CatsConfig:
        """Rebuild a config from its block and tensors.

        Raises:
            FormatError: If the block is from a newer release, lacks a field or a threshold, or
                holds an impossible value.
        """
        check_version(block, source, MASKS_VERSION)
        try:
            config = cls(
                method=block["method"],
                router=block["router"],
                target_sparsity=block["target_sparsity"],
                target_bytes=block.get("target_bytes"),
                release=block.get("release"),
                inputs=inputs or {},
                realized_sparsity=dict(block["realized_sparsity"]),
                calibration_tokens=block["calibration_tokens"],
                calibration_hash=block["calibration_hash"],
                tensors=tensors,
                fingerprints=fingerprints or {},
            )
        except KeyError as error:
            raise FormatError(f"{source}: its cats block lacks {error}") from error
        except (ConfigError, TypeError) as error:
            raise FormatError(f"{source}: cannot be used: {error}") from error
        if missing := config.realized_sparsity.keys() - tensors.keys():
            raise FormatError(
                f"{source}: the thresholds of {len(missing)} MLPs are missing; save it again"
            )
        if (stored := block.get("masked_layers", 0)) != len(config.inputs):
            raise FormatError(
                f"{source}: thresholds of the inputs of {len(config.inputs)} layers are stored, "
                f"expected {stored}; save it again"
            )
        return config

    def save(self, path: str | Path) -> None:
        """Write one small safetensors file for ``cats.from_pretrained(thresholds=...)``.

        Example:
            >>> cats.calibrate(model, batches, target_sparsity=0.5).save("cats50.safetensors")
        """
        flat = self._flat() | {f"{m}.{_FINGERPRINT}": t for m, t in self.fingerprints.items()}
        save_tensors(path, flat, {"kind": "thresholds", **self.to_dict()})

    @classmethod
    def load(cls, path: str | Path) -> CatsConfig:
        """Read a file of :meth:`save`.

        Raises:
            StorageError: If there is no such file or it cannot be read.
            FormatError: If it is damaged, is from a newer release, or holds something else.
        """
        flat, block = load_tensors(path)
        if block.get("kind") != "thresholds":
            raise FormatError(f"{path}: holds {block.get('kind')}, expected thresholds")
        tensors: dict[str, dict[str, Tensor]] = {}
        fingerprints, inputs = {}, {}
        for key, tensor in flat.items():
            mlp, _, name = key.rpartition(".")
            if name == _FINGERPRINT:
                fingerprints[mlp] = tensor
            elif name == _INPUTS:
                inputs[mlp] = tensor
            else:
                tensors.setdefault(mlp, {})[name] = tensor
        options: dict[str, Any] = {"inputs": inputs, "fingerprints": fingerprints}
        return cls.from_dict(block, tensors, source=str(path), **options)

    def _flat(self) -> dict[str, Tensor]:
        """All thresholds under their names in files."""
        flat = {f"{m}.{n}": t for m, tensors in self.tensors.items() for n, t in tensors.items()}
        return flat | {f"{layer}.{_INPUTS}": t for layer, t in self.inputs.items()}


def label_of(method: str, target_sparsity: float | None, target_bytes: float | None = None) -> str:
    """Name of a method at a target in tables and files.

    It is ``cats-50`` for half of the neurons dropped, ``cascade-b50`` for half of the bytes read,
    and ``dense`` or ``relu`` without a target.
    """
    if target_bytes is not None:
        return f"{method}-b{target_bytes * 100:.3g}"
    return method if target_sparsity is None else f"{method}-{target_sparsity * 100:g}"


def check_target(target: float | None, name: str = "target sparsity") -> None:
    """Raise ConfigError unless the target is None or inside (0, 1)."""
    if target is not None and not 0.0 < target < 1.0:
        raise ConfigError(
            f"the {name} must be a share inside (0, 1), such as 0.5 for 50 %; got {target:g}"
        )
