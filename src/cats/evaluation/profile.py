"""Statistics of the activations of a model: zeros, near zeros, and which tokens share them.

They work for all models with activation modules: with gated or ungated MLPs, dense or sparse.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from cats.calibration.collection import forward_hidden
from cats.data import Batch, as_batch
from cats.errors import DataError, UnsupportedModelError
from cats.fusion import ReadShares, fused_mlps
from cats.model import CatsActivation, activation_kind, is_sparse
from cats.storage import save_json
from cats.weights.placement import input_device

# Bins of magnitudes from 0 to 1, where most activations are; one more holds all above.
BINS = 50
UNIONS = (2, 4, 8)
_POSITIONS = 16
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """The outputs of one activation module.

    Attributes:
        name: The module, such as ``"model.layers.0.mlp.act_fn"``.
        activation: Its kind, such as ``"silu"``.
        threshold: Mean threshold of a sparse MLP; None for a dense one.
        zero: Share of outputs that are exactly zero.
        near_zero: Share of outputs whose magnitude is below ``near`` of the profile.
        histogram: Share of outputs in each of ``BINS`` equal bins of magnitudes in [0, 1), and
            the share of those above.
        by_position: Share of zeros at each sixteenth of a block, first tokens first.
        union: Number of tokens, from different texts, that are decoded together, to the share of
            neurons that are zero for all of them.
        overlap: Of the neurons that are not zero for a token, the share that was not zero for the
            token before it; None if all are zero.
    """

    name: str
    activation: str
    threshold: float | None
    zero: float
    near_zero: float
    histogram: list[float]
    by_position: list[float]
    union: dict[int, float]
    overlap: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """The activations of a model on some text.

    Attributes:
        layers: In the order of the model.
        tokens: Number of tokens that the model read.
        near: Magnitude below which an output counts as near zero.
        by_token: Quantiles over the tokens (``"5 %"`` ...) of the share of zeros in all layers.
        read: Kind of mask, such as ``"columns of down"``, to the number of tokens from different
            texts that are decoded together, to the share of its entries that is read then. Empty
            for a dense model.
    """

    layers: list[Layer]
    tokens: int
    near: float
    by_token: dict[str, float]
    read: dict[str, dict[int, float]] = field(default_factory=dict)

    def save(self, path: Path, **about: object) -> None:
        """Write one JSON document that ``cats report`` reads.

        Args:
            path: The file.
            about: Further entries of the document, such as the model and the text.
        """
        save_json(path, "profile", {**about, **asdict(self)})


def profile(model: nn.Module, batches: Iterable[Batch], *, near: float = 0.1) -> Profile:
    """Count the outputs of every activation module while the model reads the batches.

    Args:
        model: Any Hugging Face causal model that is not fused.
        batches: Token ids ``[B, T]`` without padding. Unions over 2, 4 and 8 tokens need as many
            rows in a batch.
        near: Magnitude below which an output counts as near zero.

    Raises:
        UnsupportedModelError: If no activation module runs, or the model is fused.
        DataError: If there are no tokens, or a batch is padded.
    """
    if any(fused_mlps(model)):
        raise UnsupportedModelError("a fused MLP hides its activations: call cats.unfuse_ first")
    counters = [_Counter(name, module, near) for name, module in _activations(model)]
    zeros_by_token: list[Tensor] = []
    device = input_device(model)
    numbers = (1, *UNIONS)
    reads = ReadShares(model, together=numbers) if is_sparse(model) else None
    with ExitStack() as stack:
        if reads is not None:
            stack.enter_context(reads)
        for counter in counters:
            stack.callback(counter.module.register_forward_hook(counter.count).remove)
        for batch in batches:
            ids, mask = as_batch(batch)
            if mask is not None:
                raise DataError("activations are profiled on blocks without padding only")
            for counter in counters:
                counter.shape = tuple(ids.shape)
            forward_hidden(model, ids.to(device), None)
            zeros = [c.zeros_of_tokens.cpu() for c in counters if c.zeros_of_tokens is not None]
            if zeros:
                zeros_by_token.append(torch.stack(zeros).mean(0).flatten())
    if not zeros_by_token:
        raise UnsupportedModelError(
            f"no activation module of {type(model).__name__} ran: there is nothing to profile"
        )
    shares = torch.cat(zeros_by_token)
    quantiles = torch.quantile(shares, torch.tensor(_QUANTILES)).tolist()
    return Profile(
        layers=[counter.layer() for counter in counters if counter.outputs],
        tokens=len(shares),
        near=near,
        by_token={f"{q:.0%}": v for q, v in zip(_QUANTILES, quantiles, strict=True)},
        read={} if reads is None else _by_kind(reads, numbers),
    )


def _by_kind(reads: ReadShares, numbers: Iterable[int]) -> dict[str, dict[int, float]]:
    read: dict[str, dict[int, float]] = {}
    for number in numbers:
        for kind, share in reads.by_kind(number).items():
            read.setdefault(kind, {})[number] = share
    return read


def _activations(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each activation module; in a sparse MLP the one that applies the threshold."""
    inner = {m.act for m in model.modules() if isinstance(m, CatsActivation)}
    for name, module in model.named_modules():
        if module not in inner and activation_kind(module) is not None:
            yield name, module


class _Counter:
    """Counts the outputs of one activation module.

    Attributes:
        shape: ``(B, T)`` of the next batch.
        zeros_of_tokens: ``[B, T]``, the share of zeros of each token of the last batch.
    """

    def __init__(self, name: str, module: nn.Module, near: float) -> None:
        self.name, self.module, self._near = name, module, near
        self.shape: tuple[int, ...] = ()
        self.zeros_of_tokens: Tensor | None = None
        self.outputs = 0
        self._zero = self._near_zero = 0
        self._histogram = torch.zeros(BINS + 1, dtype=torch.int64)
        self._positions = torch.zeros(_POSITIONS, 2, dtype=torch.float64)
        self._unions = {n: [0, 0] for n in UNIONS}
        self._kept_twice = self._kept_after_first = 0

    def count(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        # some models flatten batch and tokens before the MLP
        a = output.detach().reshape(*self.shape, -1).float().abs()
        zero = a == 0
        self.outputs += a.numel()
        self._zero += int(zero.sum())
        self._near_zero += int((a < self._near).sum())
        bins = (a * BINS).clamp(max=BINS).long().flatten()
        self._histogram += torch.bincount(bins, minlength=BINS + 1).cpu()
        self.zeros_of_tokens = zero.float().mean(-1)
        self._count_positions(self.zeros_of_tokens.double().mean(0).cpu())
        self._count_unions(zero)
        kept = ~zero
        self._kept_twice += int((kept[:, 1:] & kept[:, :-1]).sum())
        self._kept_after_first += int(kept[:, 1:].sum())

    def _count_positions(self, by_position: Tensor) -> None:
        part = torch.arange(len(by_position)) * _POSITIONS // len(by_position)
        self._positions[:, 0].index_add_(0, part, by_position)
        self._positions[:, 1] += torch.bincount(part, minlength=_POSITIONS)

    def _count_unions(self, zero: Tensor) -> None:
        for n, sums in self._unions.items():
            groups = len(zero) // n
            if groups:
                shared = zero[: groups * n].unflatten(0, (groups, n)).all(1)
                sums[0] += int(shared.sum())
                sums[1] += shared.numel()

    def layer(self) -> Layer:
        module = self.module
        threshold = float(module.threshold.mean()) if isinstance(module, CatsActivation) else None
        return Layer(
            name=self.name,
            activation=str(activation_kind(module)),
            threshold=threshold,
            zero=self._zero / self.outputs,
            near_zero=self._near_zero / self.outputs,
            histogram=(self._histogram / self.outputs).tolist(),
            by_position=[s / n for s, n in self._positions.tolist() if n],
            union={n: zero / total for n, (zero, total) in self._unions.items() if total},
            overlap=(self._kept_twice / self._kept_after_first if self._kept_after_first else None),
        )
