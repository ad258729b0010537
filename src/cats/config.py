"""The result of calibration: the thresholds of each gated MLP, and their origin."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cats.errors import ConfigError, FormatError
from cats.storage import FORMAT_VERSION, check_version, load_tensors, save_tensors

_FINGERPRINT = "fingerprint"


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
    realized_sparsity: dict[str, float] = field(default_factory=dict)
    calibration_tokens: int = 0
    calibration_hash: str = ""
    fingerprints: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_target(self.target_sparsity)
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

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CatsConfig):
            return NotImplemented
        same = self.to_dict() == other.to_dict() and self.tensors.keys() == other.tensors.keys()
        return same and all(
            tensors.keys() == other.tensors[mlp].keys()
            and all(torch.equal(t, other.tensors[mlp][name]) for name, t in tensors.items())
            for mlp, tensors in self.tensors.items()
        )

    @property
    def thresholds(self) -> dict[str, Tensor]:
        """Name of each sparse MLP to its threshold: one number, ``[F]`` or ``[E, 1]``."""
        return {mlp: tensors["threshold"] for mlp, tensors in self.tensors.items()}

    def to_dict(self) -> dict[str, Any]:
        """The small ``cats`` block of ``config.json``; tensors are stored beside the weights."""
        return {
            "version": FORMAT_VERSION,
            "method": self.method,
            "router": self.router,
            "target_sparsity": self.target_sparsity,
            "realized_sparsity": {n: round(s, 5) for n, s in self.realized_sparsity.items()},
            "calibration_tokens": self.calibration_tokens,
            "calibration_hash": self.calibration_hash,
        }

    @classmethod
    def from_dict(
        cls,
        block: dict[str, Any],
        tensors: dict[str, dict[str, Tensor]],
        *,
        fingerprints: dict[str, Tensor] | None = None,
        source: str = "cats block",
    ) -> CatsConfig:
        """Rebuild a config from its block and tensors.

        Raises:
            FormatError: If the block is from a newer release, lacks a field or a threshold, or
                holds an impossible value.
        """
        check_version(block, source)
        try:
            config = cls(
                method=block["method"],
                router=block["router"],
                target_sparsity=block["target_sparsity"],
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
        return config

    def save(self, path: str | Path) -> None:
        """Write one small safetensors file for ``cats.from_pretrained(thresholds=...)``.

        Example:
            >>> cats.calibrate(model, batches, target_sparsity=0.5).save("cats50.safetensors")
        """
        flat = {f"{m}.{n}": t for m, tensors in self.tensors.items() for n, t in tensors.items()}
        flat |= {f"{m}.{_FINGERPRINT}": t for m, t in self.fingerprints.items()}
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
        fingerprints = {}
        for key, tensor in flat.items():
            mlp, _, name = key.rpartition(".")
            if name == _FINGERPRINT:
                fingerprints[mlp] = tensor
            else:
                tensors.setdefault(mlp, {})[name] = tensor
        return cls.from_dict(block, tensors, fingerprints=fingerprints, source=str(path))


def label_of(method: str, target_sparsity: float | None) -> str:
    """Name of a method at a target in tables and files, such as ``cats-50`` or ``dense``."""
    return method if target_sparsity is None else f"{method}-{target_sparsity * 100:g}"


def check_target(target_sparsity: float | None) -> None:
    """Raise ConfigError unless the target is None or inside (0, 1)."""
    if target_sparsity is not None and not 0.0 < target_sparsity < 1.0:
        raise ConfigError(
            "the target sparsity must be a share inside (0, 1), such as 0.5 for 50 %; "
            f"got {target_sparsity:g}"
        )
