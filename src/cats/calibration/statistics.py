"""The counts of a calibration pass: they can be added and saved, and give every target."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cats.calibration import counts as _counts
from cats.config import CatsConfig, check_target
from cats.errors import ConfigError, DataError, FormatError, ModelMismatchError
from cats.methods import get_counted
from cats.storage import load_tensors, save_tensors

_HASH_MODULUS = 1 << 64


@dataclass(kw_only=True, slots=True)
class Statistics:
    """Counts of each MLP's router values over some text.

    Statistics of two parts of a text add up to those of the whole text, bit for bit.

    Attributes:
        method: Name of the method that chose the counted values.
        activations: Name of each MLP to the name of its activation.
        sizes: Name of each MLP to its number of neurons ``F``.
        counts: Name of each MLP to its counts, int64; 16 MiB, however many tokens there are.
        fingerprints: Name of each MLP to a few of its weights, float32.
        weights: Hash of the whole model, :func:`cats.fingerprint.of_model`; empty in files of older
            releases.
        tokens: How many tokens were counted.
        blocks: How many rows of batches were counted.
        text_hash: Sum over the blocks of a hash of their tokens, modulo 2**64, so that their order
            does not matter.
    """

    method: str
    activations: dict[str, str]
    sizes: dict[str, int]
    counts: dict[str, Tensor]
    fingerprints: dict[str, Tensor] = field(repr=False)
    weights: str = ""
    tokens: int = 0
    blocks: int = 0
    text_hash: int = 0

    def __add__(self, other: Statistics) -> Statistics:
        self._check_same_model(other)
        return replace(
            self,
            counts={name: c + other.counts[name] for name, c in self.counts.items()},
            tokens=self.tokens + other.tokens,
            blocks=self.blocks + other.blocks,
            text_hash=(self.text_hash + other.text_hash) % _HASH_MODULUS,
        )

    def config(self, target_sparsity: float | None = None) -> CatsConfig:
        """The thresholds for one target.

        Args:
            target_sparsity: Fraction of neurons to drop, inside (0, 1); None where the method has
                no target.

        Raises:
            ConfigError: If the target does not fit the method.
            DataError: If there were no tokens, or an MLP never ran.
        """
        method = get_counted(self.method)
        check_target(target_sparsity)
        if method.has_target != (target_sparsity is not None):
            needs = "needs" if method.has_target else "has no"
            raise ConfigError(
                f"method {self.method!r} {needs} target_sparsity, got {target_sparsity}"
            )
        if not self.tokens:
            raise DataError(
                "no tokens to calibrate on: give at least one batch of token ids [B, T]"
            )
        tensors, realized = {}, {}
        for name, counts in self.counts.items():
            if not counts.any():
                raise DataError(
                    f"{name} never ran on the text: leave it out with exclude=[{name!r}]"
                )

            def score(values: Tensor, activation: str = self.activations[name]) -> Tensor:
                return method.score(values, activation)

            if target_sparsity is None:
                threshold, realized[name] = torch.zeros(()), _counts.fraction_dropped(counts, score)
            else:
                threshold, realized[name] = _counts.threshold_at(counts, score, target_sparsity)
            tensors[name] = {"threshold": threshold}
        return CatsConfig(
            method=self.method,
            router=method.router,
            target_sparsity=target_sparsity,
            tensors=tensors,
            realized_sparsity=realized,
            calibration_tokens=self.tokens,
            calibration_hash=f"{self.text_hash:016x}",
            fingerprints=self.fingerprints,
        )

    def all_reduce(self) -> Statistics:
        """The sum over all processes of the default ``torch.distributed`` group."""
        device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")

        def total(tensor: Tensor) -> Tensor:
            tensor = tensor.to(device, copy=True)
            dist.all_reduce(tensor)
            return tensor.cpu()

        # a sum of int64 wraps around at 2**64, which is the modulus
        signed = self.text_hash - _HASH_MODULUS * (self.text_hash >= _HASH_MODULUS // 2)
        tokens, blocks, text_hash = total(torch.tensor([self.tokens, self.blocks, signed])).tolist()
        return replace(
            self,
            counts={name: total(c) for name, c in self.counts.items()},
            tokens=tokens,
            blocks=blocks,
            text_hash=text_hash % _HASH_MODULUS,
        )

    def save(self, path: str | Path) -> None:
        """Write the counts that are not zero, as one safetensors file."""
        tensors = {f"{name}.fingerprint": t for name, t in self.fingerprints.items()}
        for name, counts in self.counts.items():
            bins = counts.nonzero()[:, 0]
            tensors |= {f"{name}.bins": bins.int(), f"{name}.counts": counts[bins]}
        save_tensors(path, tensors, {"kind": "statistics", **self._block()})

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what :meth:`save` wrote.

        Raises:
            StorageError: If there is no such file or it cannot be read.
            FormatError: If it is corrupt, comes from a newer release, or holds something else.
        """
        tensors, block = load_tensors(path)
        if block.get("kind") != "statistics":
            raise FormatError(f"{path}: holds {block.get('kind')}, expected statistics")
        try:
            counts = {
                name: torch.zeros(_counts.BINS, dtype=torch.int64).index_put_(
                    (tensors[f"{name}.bins"].long(),), tensors[f"{name}.counts"]
                )
                for name in block["sizes"]
            }
            return cls(
                method=block["method"],
                activations=block["activations"],
                sizes=block["sizes"],
                counts=counts,
                fingerprints={name: tensors[f"{name}.fingerprint"] for name in block["sizes"]},
                weights=block.get("weights", ""),
                tokens=block["tokens"],
                blocks=block["blocks"],
                text_hash=int(block["text_hash"], 16),
            )
        # torch raises RuntimeError if counts and bins differ in number
        except (KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise FormatError(f"{path}: damaged statistics ({error}); delete the file") from error

    def _block(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "activations": self.activations,
            "sizes": self.sizes,
            "weights": self.weights,
            "tokens": self.tokens,
            "blocks": self.blocks,
            "text_hash": f"{self.text_hash:016x}",
        }

    def _check_same_model(self, other: Statistics) -> None:
        mine, theirs = (
            json.dumps([s.method, s.activations, s.sizes], sort_keys=True) for s in (self, other)
        )
        if mine != theirs or any(
            not torch.equal(f, other.fingerprints[name]) for name, f in self.fingerprints.items()
        ):
            raise ModelMismatchError(
                "statistics of two different models or methods cannot be added: "
                "collect both with the same model, method and exclude"
            )
        if self.weights != other.weights:
            if not (self.weights and other.weights):
                raise ModelMismatchError(
                    "statistics of an older release do not say which weights they were counted "
                    "with, so nothing can be added to them: collect them anew"
                )
            raise ModelMismatchError(
                "statistics of two models whose MLPs are alike and whose other weights or dtypes "
                "differ cannot be added: collect both with the same model"
            )
