"""The counts of a calibration pass: they can be added and saved, and give every target."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
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
# A quantile of the neurons of fewer tokens than these is rough.
_FEW_TOKENS = 32


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
        expert_tokens: Name of each module of stacked experts to how many tokens each expert got,
            ``[E]``, int64.
        expert_counts: Name of each of these to the counts of each expert, ``[E, EXPERT_BINS]``,
            int64; empty unless experts get thresholds of their own.
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
    expert_tokens: dict[str, Tensor] = field(default_factory=dict, repr=False)
    expert_counts: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __add__(self, other: Statistics) -> Statistics:
        self._check_same_model(other)
        return replace(
            self,
            counts={name: c + other.counts[name] for name, c in self.counts.items()},
            tokens=self.tokens + other.tokens,
            blocks=self.blocks + other.blocks,
            text_hash=(self.text_hash + other.text_hash) % _HASH_MODULUS,
            expert_tokens=_added(self.expert_tokens, other.expert_tokens),
            expert_counts=_added(self.expert_counts, other.expert_counts),
        )

    def rare_experts(self, tokens: int = _FEW_TOKENS) -> dict[str, list[int]]:
        """Name of each module of experts to the experts that got fewer tokens; others are left out.

        Their thresholds, if each expert has its own, are those of a few tokens.
        """
        rare = {n: (t < tokens).nonzero()[:, 0].tolist() for n, t in self.expert_tokens.items()}
        return {name: experts for name, experts in rare.items() if experts}

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

            find = partial(_threshold, score=score, target=target_sparsity)
            if name in self.expert_counts:
                threshold, realized[name] = self._of_experts(name, find)
            else:
                threshold, realized[name] = find(counts)
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

    def _of_experts(
        self, name: str, find: Callable[[Tensor], tuple[Tensor, float]]
    ) -> tuple[Tensor, float]:
        """One threshold per expert, ``[E, 1]``, and the fraction that they drop together.

        Raises:
            DataError: If an expert got no token.
        """
        tokens = self.expert_tokens[name]
        if unseen := (tokens == 0).nonzero()[:, 0].tolist():
            raise DataError(
                f"{name}: {len(unseen)} of {len(tokens)} experts, such as number {unseen[0]}, got "
                f"none of the {self.tokens:,} tokens, so that they have no threshold: calibrate on "
                "more text, or with one threshold for all experts of a layer (per_expert=False)"
            )
        if rare := self.rare_experts().get(name):
            warnings.warn(
                f"{name}: experts {', '.join(map(str, rare))} got fewer than {_FEW_TOKENS} of the "
                f"{self.tokens:,} tokens; their thresholds are rough",
                stacklevel=4,
            )
        found = [find(_counts.widened(counts)) for counts in self.expert_counts[name]]
        thresholds = torch.stack([threshold for threshold, _ in found])[:, None]
        shares = torch.tensor([share for _, share in found], dtype=torch.float64)
        return thresholds, float((shares * tokens).sum() / tokens.sum())

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
            expert_tokens={name: total(t) for name, t in self.expert_tokens.items()},
            expert_counts={name: total(c) for name, c in self.expert_counts.items()},
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
        tensors |= {f"{name}.expert_tokens": t for name, t in self.expert_tokens.items()}
        for name, counts in self.expert_counts.items():
            bins = counts.flatten().nonzero()[:, 0]
            tensors[f"{name}.expert_bins"] = bins
            tensors[f"{name}.expert_counts"] = counts.flatten()[bins]
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
            names = [name for name in block["sizes"] if f"{name}.expert_tokens" in tensors]
            expert_tokens = {name: tensors[f"{name}.expert_tokens"] for name in names}
            expert_counts = {
                name: torch.zeros(len(expert_tokens[name]) * _counts.EXPERT_BINS, dtype=torch.int64)
                .index_put_((tensors[f"{name}.expert_bins"],), tensors[f"{name}.expert_counts"])
                .view(-1, _counts.EXPERT_BINS)
                for name in names
                if f"{name}.expert_bins" in tensors
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
                expert_tokens=expert_tokens,
                expert_counts=expert_counts,
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
        if self.expert_counts.keys() != other.expert_counts.keys():
            raise ModelMismatchError(
                "statistics with counts per expert and such without cannot be added: collect both "
                "with the same per_expert"
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


def _added(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor + theirs[name] for name, tensor in mine.items()}


def _threshold(
    counts: Tensor, *, score: Callable[[Tensor], Tensor], target: float | None
) -> tuple[Tensor, float]:
    """A threshold and the fraction of the counted values that it drops."""
    if target is None:
        return torch.zeros(()), _counts.fraction_dropped(counts, score)
    return _counts.threshold_at(counts, score, target)
