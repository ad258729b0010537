"""Thresholds on the inputs of an MLP's matrices: uniform, or as TEAL allocates them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cats.calibration import counts as _counts
from cats.calibration.collection import forward_hidden
from cats.config import CatsConfig, check_target
from cats.data import Batch, as_batch
from cats.errors import DataError
from cats.evaluation.variants import InputThresholds
from cats.functional import keep_mask
from cats.model import GatedExperts, GatedMLP, find_gated_mlps
from cats.weights.placement import input_device

# TEAL's greedy search: the share of the MLP's weights that one step drops, the largest share that a
# matrix may lose, and the number of tokens on which errors are compared.
_STEP = 0.05
_LARGEST = 0.99
_SEARCH_TOKENS = 256
PreHook: TypeAlias = Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]
# Magnitudes have no sign bit.
_BINS = _counts.BINS // 2


@dataclass(kw_only=True, slots=True)
class InputCounts:
    """Counts of the inputs of the MLPs' matrices, from one pass of the dense model.

    Attributes:
        mlps: The gated MLPs of the model.
        counts: ``<mlp>.<linear>`` to counts of the magnitudes of its input, ``[BINS // 2]``, int64.
        samples: Name of each MLP to some of its inputs, ``[N, D]``.
        tokens: Number of tokens that were counted.
    """

    mlps: list[GatedMLP]
    counts: dict[str, Tensor]
    samples: dict[str, Tensor]
    tokens: int
    # cache: name of each layer to rising magnitudes, and the share of its input below each
    _quantiles: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def collect(cls, model: nn.Module, batches: Iterable[Batch]) -> InputCounts:
        """Run the text through the dense model, without padding.

        Raises:
            UnsupportedModelError: If the model has no gated MLP, or stacked experts.
            DataError: If there are no tokens, or a batch is padded.
        """
        collected = cls(mlps=find_gated_mlps(model), counts={}, samples={}, tokens=0)
        for mlp in collected.mlps:
            if isinstance(mlp, GatedExperts):
                mlp.known_layout()  # raises: they have no inputs of layers
        device = input_device(model)
        with ExitStack() as stack:
            for mlp in collected.mlps:
                stack.callback(collected._keep_samples(mlp).remove)
                for name in mlp.matrices:
                    layer = mlp.module.get_submodule(name)
                    stack.callback(collected._count_inputs(f"{mlp.name}.{name}", layer).remove)
            for batch in batches:
                ids, mask = as_batch(batch)
                if mask is not None:
                    raise DataError("inputs are counted on blocks without padding only")
                forward_hidden(model, ids.to(device), None)
                collected.tokens += ids.numel()
        if not collected.tokens:
            raise DataError("no tokens to calibrate on")
        return collected

    def uniform(self, target: float) -> InputThresholds:
        """The same share of the weights of every matrix is not read.

        Args:
            target: That share, inside (0, 1).
        """
        check_target(target)
        sparsities = {mlp.name: dict.fromkeys(mlp.matrices, target) for mlp in self.mlps}
        return self._variant("input", target, sparsities)

    def teal(self, target: float) -> InputThresholds:
        """TEAL's greedy allocation inside each MLP (arXiv:2408.14690, algorithm 1).

        Args:
            target: Share of each MLP's weights that is not read, inside (0, 1).
        """
        check_target(target)
        sparsities = {mlp.name: self.allocate(mlp, target) for mlp in self.mlps}
        return self._variant("teal", target, sparsities)

    def _variant(
        self, method: str, target: float, sparsities: dict[str, dict[str, float]]
    ) -> InputThresholds:
        by_name = {mlp.name: mlp for mlp in self.mlps}
        inputs = {}
        for mlp, layers in sparsities.items():
            for name, share in layers.items():
                columns = by_name[mlp].matrices[name].shape[1]
                inputs[f"{mlp}.{name}"] = torch.full(
                    (columns,), self._threshold(f"{mlp}.{name}", share)
                )
        config = CatsConfig(
            method="teal",
            target_sparsity=None,
            target_bytes=1 - target,
            tensors={mlp: {"threshold": torch.zeros(())} for mlp in sparsities},
            inputs=inputs,
            calibration_tokens=self.tokens,
        )
        return InputThresholds(config, method=method, target=target)

    def _threshold(self, layer: str, sparsity: float) -> float:
        """The magnitude below which that share of the layer's inputs lies."""
        if layer not in self._quantiles:
            counts = self.counts[layer].cpu()
            bins = counts.nonzero()[:, 0]
            below = (counts[bins].cumsum(0) - counts[bins]).double() / counts.sum()
            self._quantiles[layer] = _counts.bin_values(bins), below
        values, below = self._quantiles[layer]
        first = int(torch.searchsorted(below, sparsity))
        return float(values[min(first, len(values) - 1)]) if sparsity else 0.0

    def allocate(self, mlp: GatedMLP, target: float) -> dict[str, float]:
        """Name of each matrix of an MLP to the share of it that is not read, by TEAL's algorithm.

        All matrices start dense. Each step drops a further piece of one matrix: the piece that
        changes the output of the MLP least. TEAL allocates over the attention matrices of a layer
        as well; here, as in CATS, they stay dense.

        Args:
            mlp: One of ``mlps``.
            target: As for :meth:`teal`.
        """
        sizes = {name: matrix.bytes for name, matrix in mlp.matrices.items()}
        total = sum(sizes.values())
        sparsities = dict.fromkeys(sizes, 0.0)
        x = self.samples[mlp.name][None]
        with torch.no_grad():
            exact = mlp.module(x)
        done = 0.0
        while done < target - 1e-9:
            step = min(_STEP, target - done)
            candidates = {
                name: sparsities | {name: sparsities[name] + step * total / size}
                for name, size in sizes.items()
                if sparsities[name] + step * total / size <= _LARGEST
            }
            if not candidates:
                break
            errors = {n: self._error(mlp, x, exact, shares) for n, shares in candidates.items()}
            sparsities = candidates[min(errors, key=errors.__getitem__)]
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

    def _count_inputs(self, name: str, layer: nn.Module) -> RemovableHandle:
        def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            new = _counts.count(args[0].detach().abs())[:_BINS]
            self.counts[name] = self.counts[name] + new if name in self.counts else new

        return layer.register_forward_pre_hook(count)

    def _keep_samples(self, mlp: GatedMLP) -> RemovableHandle:
        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if mlp.name not in self.samples:
                self.samples[mlp.name] = args[0].detach().flatten(0, -2)[:_SEARCH_TOKENS].clone()

        return mlp.module.register_forward_pre_hook(keep)


def _dropping(threshold: float) -> PreHook:
    def drop(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].masked_fill(~keep_mask(args[0], threshold), 0),)

    return drop
