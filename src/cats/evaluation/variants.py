"""The ways to run a model that an evaluation compares: dense, sparse, quantised.

The evaluation takes any :class:`Variant`. To compare another method, add a small class here, or a
method to :mod:`cats.methods`, which :class:`Sparse` runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from cats import fingerprint
from cats.apply import densify_, sparsify_
from cats.config import CatsConfig, label_of
from cats.data import Batch
from cats.errors import ConfigError
from cats.evaluation.traffic import mean_share, neuron_shares
from cats.functional import keep_mask
from cats.metrics import perplexity, perplexity_and_sparsity
from cats.model import find_gated_mlps
from cats.processes import in_order
from cats.results import QUANTISED
from cats.weights import QuantisedLinear

PreHook: TypeAlias = Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]


class Variant(ABC):
    """One way to run a dense model.

    Attributes:
        label: Its name in tables and files, such as ``"cats-50"``.
        settings: All that its answers depend on, besides the model and the data.
        dropped: Mean share of neurons that the last measurement dropped; None if it drops none.
        losses: Of the last measurement, the mean negative log-likelihood of each block.
    """

    label: str
    settings: dict[str, str | int | float | bool | None]
    dropped: float | None = None
    losses: list[float]

    def base(self, model: nn.Module) -> nn.Module:
        """The dense model whose weights this variant reads, where ``model`` is what is compared."""
        return model

    @abstractmethod
    def on(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Context that gives the model that runs this way; after it ``model`` is dense again."""

    @abstractmethod
    def measure(self, model: nn.Module, batches: Iterable[Batch]) -> tuple[float, float]:
        """Perplexity, and the share of the gated MLPs' weights that a token reads.

        The processes of a ``torch.distributed`` group share the batches, and all of them get the
        numbers of one process.

        Args:
            model: The dense model.
            batches: As for :func:`cats.metrics.perplexity`.
        """


class Dense(Variant):
    """The model without changes."""

    def __init__(self) -> None:
        self.label = "dense"
        self.settings = {"method": "dense", "target_sparsity": None}

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[nn.Module]:
        yield model

    def measure(self, model: nn.Module, batches: Iterable[Batch]) -> tuple[float, float]:
        self.losses = []
        return perplexity(model, batches, losses=self.losses, share=True), 1.0


class Sparse(Variant):
    """Thresholds on neurons: CATS, ReLU, or any other method that :mod:`cats.methods` has."""

    def __init__(self, config: CatsConfig) -> None:
        self._config = config
        target = config.target_sparsity
        self.label = label_of(config.method, target)
        self.settings = {
            "method": config.method,
            "target_sparsity": target,
            "calibration_tokens": config.calibration_tokens,
            "calibration_hash": config.calibration_hash,
            "thresholds": fingerprint.of_thresholds(config),
        }

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[nn.Module]:
        try:
            yield sparsify_(model, self._config)
        finally:
            densify_(model)

    def measure(self, model: nn.Module, batches: Iterable[Batch]) -> tuple[float, float]:
        self.losses = []
        with self.on(model):
            value, realized = perplexity_and_sparsity(
                model, batches, losses=self.losses, share=True
            )
        self.dropped = sum(realized.values()) / len(realized)
        return value, mean_share(model, neuron_shares(model, realized))


class InCodes(Variant):
    """A quantised copy of the model, dense or in a way of its own."""

    def __init__(
        self, model: nn.Module, way: Variant | None = None, *, name: str | None = None
    ) -> None:
        """
        Args:
            model: The quantised model, dense.
            way: How it runs, such as ``Sparse(config)`` with thresholds of its own.
            name: Its name in tables and files; None for ``"int4"``, ``"int8"`` or ``"float8"``.

        Raises:
            ConfigError: If no layer of the model is quantised.
        """
        way = way or Dense()
        self._model, self._way = model, way
        sizes: Counter[tuple[str, int, int | None]] = Counter()
        for module in model.modules():
            if isinstance(module, QuantisedLinear):
                weight = module.matrix
                group = None if weight.groups == 1 else weight.group_size
                sizes[weight.kind, weight.bits, group] += weight.shape[0] * weight.columns
        if not sizes:
            raise ConfigError("no layer of the model is quantised: cats quantize makes such a one")
        kind, bits, group_size = sizes.most_common(1)[0][0]
        name = name or kind
        is_dense = isinstance(way, Dense)
        self.label = name if is_dense else f"{name}-{way.label}"
        self.settings = {
            **way.settings,
            **({"method": QUANTISED} if is_dense else {}),
            "quantised": name,
            "bits": bits,
            "group_size": group_size,
            "codes": fingerprint.of_model(model),
        }

    def base(self, model: nn.Module) -> nn.Module:
        return self._model

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[nn.Module]:
        with self._way.on(self._model) as running:
            yield running

    def measure(self, model: nn.Module, batches: Iterable[Batch]) -> tuple[float, float]:
        value, share = self._way.measure(self._model, batches)
        self.dropped, self.losses = self._way.dropped, self._way.losses
        return value, share


class InputThresholds(Variant):
    """Input thresholding: small entries of each matrix's input are dropped (arXiv:2408.14690).

    The column of a dropped entry need not be read. For comparison only: there is no kernel for it.
    """

    def __init__(
        self,
        thresholds: dict[str, dict[str, float]],
        *,
        method: str,
        target: float,
        calibration_tokens: int,
    ) -> None:
        """
        Args:
            thresholds: Name of each MLP to {name of a linear layer in it: threshold}.
            method: ``"input"``, or ``"teal"`` where TEAL's allocation chose the thresholds.
            target: Share of the weights that are not read, as calibration intended.
            calibration_tokens: Number of tokens of the calibration.
        """
        self.thresholds = thresholds
        self.label = f"{method}-{target * 100:.3g}"
        self.settings = {
            "method": method,
            "target_sparsity": target,
            "calibration_tokens": calibration_tokens,
            "thresholds": fingerprint.of_value(thresholds),
        }
        # per layer and batch: the share of kept inputs, summed over tokens, and their number
        self._kept: dict[str, list[tuple[Tensor, int]]] = {}

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[nn.Module]:
        with ExitStack() as stack:
            for mlp, thresholds in self.thresholds.items():
                for name, threshold in thresholds.items():
                    layer = model.get_submodule(f"{mlp}.{name}")
                    hook = self._hook(f"{mlp}.{name}", threshold)
                    stack.callback(layer.register_forward_pre_hook(hook).remove)
            yield model

    def measure(self, model: nn.Module, batches: Iterable[Batch]) -> tuple[float, float]:
        self._kept, self.losses = {}, []
        with self.on(model):
            value = perplexity(model, batches, losses=self.losses, share=True)
        shares = {}
        for mlp in find_gated_mlps(model, names=self.thresholds):
            read = 0.0
            for layer, matrix in mlp.matrices.items():
                own = [(float(kept), n) for kept, n in self._kept.get(f"{mlp.name}.{layer}", [])]
                kept, tokens = map(sum, zip(*in_order(own), strict=True))
                read += matrix.bytes * kept / tokens
            shares[mlp.name] = read / mlp.bytes
        return value, mean_share(model, shares)

    def _hook(self, name: str, threshold: float) -> PreHook:
        @torch.no_grad()
        def drop(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            kept = keep_mask(args[0], threshold)
            share = kept.float().mean(-1).sum()
            self._kept.setdefault(name, []).append((share, kept[..., 0].numel()))
            return args[0].masked_fill(~kept, 0), *args[1:]

        return drop
