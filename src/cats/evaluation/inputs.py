"""Thresholds on the inputs of an MLP's matrices: uniform, or as TEAL allocates them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cats.calibration import counts as _counts
from cats.calibration.collect import forward_hidden
from cats.config import check_target
from cats.data import Batch, as_batch
from cats.errors import DataError
from cats.evaluation.variants import InputThresholds
from cats.functional import keep_mask
from cats.model import GatedMLP, find_gated_mlps
from cats.weights.placement import input_device

# Of TEAL's greedy search: the share of the MLP's weights that one step drops.
_STEP = 0.05
_LARGEST = 0.99
# Tokens whose output decides which matrix loses most.
_SEARCH_TOKENS = 256
# Magnitudes have no sign bit.
_BINS = _counts.BINS // 2


@dataclass(kw_only=True, slots=True)
class InputCounts:
    """What one pass of the dense model counted of the inputs of its MLPs' matrices.

    Attributes:
        mlps: The gated MLPs of the model.
        counts: ``<mlp>.<linear>`` to counts of the magnitudes of its input, ``[BINS // 2]``, int64.
        samples: Name of each MLP to some of its inputs, ``[N, D]``.
        tokens: How many tokens were seen.
    """

    mlps: list[GatedMLP]
    counts: dict[str, Tensor]
    samples: dict[str, Tensor]
    tokens: int
    # of each layer the rising magnitudes, and the share of its input below each: made once
    _quantiles: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def collect(cls, model: Any, batches: Iterable[Batch]) -> InputCounts:
        """Run the text through the dense model, without padding.

        Raises:
            UnsupportedModelError: If the model has no gated MLP.
            DataError: If there are no tokens, or a batch is padded.
        """
        found = cls(mlps=find_gated_mlps(model), counts={}, samples={}, tokens=0)
        device = input_device(model)
        with ExitStack() as stack:
            for mlp in found.mlps:
                stack.callback(found._watch_samples(mlp).remove)
                for name in mlp.matrices:
                    layer = mlp.module.get_submodule(name)
                    stack.callback(found._watch(f"{mlp.name}.{name}", layer).remove)
            for batch in batches:
                ids, mask = as_batch(batch)
                if mask is not None:
                    raise DataError("inputs are counted on blocks without padding only")
                forward_hidden(model, ids.to(device), None)
                found.tokens += ids.numel()
        if not found.tokens:
            raise DataError("no tokens to calibrate on")
        return found

    def uniform(self, target: float) -> InputThresholds:
        """Every matrix leaves the same share of its weights unread.

        Args:
            target: That share, inside (0, 1).
        """
        check_target(target)
        return self._variant("input", target, {
            mlp.name: dict.fromkeys(mlp.matrices, target) for mlp in self.mlps
        })  # fmt: skip

    def teal(self, target: float) -> InputThresholds:
        """TEAL's greedy allocation inside each MLP (arXiv:2408.14690, algorithm 1).

        The matrices start whole; again and again the one whose loss changes the MLP's output
        least loses a further piece, until the MLP leaves the target share unread. TEAL allocates
        over the attention matrices of a layer as well; here, as in CATS, they stay dense.

        Args:
            target: Share of each MLP's weights to leave unread, inside (0, 1).
        """
        check_target(target)
        return self._variant("teal", target, {
            mlp.name: self._allocate(mlp, target) for mlp in self.mlps
        })  # fmt: skip

    def _variant(
        self, method: str, target: float, sparsities: dict[str, dict[str, float]]
    ) -> InputThresholds:
        thresholds = {
            mlp: {name: self._threshold(f"{mlp}.{name}", s) for name, s in layers.items()}
            for mlp, layers in sparsities.items()
        }
        return InputThresholds(
            thresholds, method=method, target=target, calibration_tokens=self.tokens
        )

    def _threshold(self, layer: str, sparsity: float) -> float:
        """The magnitude below which that share of the layer's input lies."""
        if layer not in self._quantiles:
            counts = self.counts[layer].cpu()
            bins = counts.nonzero()[:, 0]
            below = (counts[bins].cumsum(0) - counts[bins]).double() / counts.sum()
            self._quantiles[layer] = _counts.bin_values(bins), below
        values, below = self._quantiles[layer]
        first = int(torch.searchsorted(below, sparsity))
        return float(values[min(first, len(values) - 1)]) if sparsity else 0.0

    def _allocate(self, mlp: GatedMLP, target: float) -> dict[str, float]:
        sizes = {name: matrix.bytes for name, matrix in mlp.matrices.items()}
        total = sum(sizes.values())
        sparsities = dict.fromkeys(sizes, 0.0)
        x = self.samples[mlp.name][None]
        with torch.no_grad():
            exact = mlp.module(x)
        done = 0.0
        while done < target - 1e-9:
            step = min(_STEP, target - done)
            tries = {
                name: sparsities | {name: sparsities[name] + step * total / size}
                for name, size in sizes.items()
                if sparsities[name] + step * total / size <= _LARGEST
            }
            if not tries:
                break
            errors = {name: self._error(mlp, x, exact, tried) for name, tried in tries.items()}
            sparsities = tries[min(errors, key=errors.__getitem__)]
            done += step
        return sparsities

    def _error(
        self, mlp: GatedMLP, x: Tensor, exact: Tensor, sparsities: dict[str, float]
    ) -> float:
        with ExitStack() as stack, torch.no_grad():
            for name in mlp.matrices:
                layer = mlp.module.get_submodule(name)
                threshold = self._threshold(f"{mlp.name}.{name}", sparsities[name])
                stack.callback(layer.register_forward_pre_hook(_dropping(threshold)).remove)
            return float((mlp.module(x) - exact).float().norm())

    def _watch(self, name: str, layer: nn.Module) -> Any:
        def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            new = _counts.count(args[0].detach().abs())[:_BINS]
            self.counts[name] = self.counts[name] + new if name in self.counts else new

        return layer.register_forward_pre_hook(count)

    def _watch_samples(self, mlp: GatedMLP) -> Any:
        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if mlp.name not in self.samples:
                self.samples[mlp.name] = args[0].detach().flatten(0, -2)[:_SEARCH_TOKENS].clone()

        return mlp.module.register_forward_pre_hook(keep)


def _dropping(threshold: float) -> Any:
    def drop(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].masked_fill(~keep_mask(args[0], threshold), 0),)

    return drop
