"""The ways to run a model that an evaluation compares: dense, sparse, quantised.

The evaluation takes any :class:`Variant`. To compare another method, add a small class here, or a
method to :mod:`cats.methods`, which :class:`Sparse` runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType

from torch import nn

from cats import fingerprint
from cats.apply import densify_, sparsify_
from cats.config import CatsConfig, label_of
from cats.data import Batch
from cats.errors import ConfigError
from cats.evaluation.traffic import mean_share, mlp_shares
from cats.metrics import perplexity, perplexity_and_shares
from cats.results import QUANTISED
from cats.weights import QuantisedLinear


class Variant(ABC):
    """One way to run a dense model.

    Attributes:
        label: Its name in tables and files, such as ``"cats-50"``.
        settings: All that its answers depend on, besides the model and the data.
        dropped: Mean share of neurons that the last measurement dropped; None if it drops none.
        losses: Of the last measurement, the mean negative log-likelihood of each block.
        read: Of the last measurement, name of each linear layer that is not read whole to the share
            of its matrix that a token reads.
    """

    label: str
    settings: dict[str, str | int | float | bool | None]
    dropped: float | None = None
    losses: list[float]
    read: Mapping[str, float] = MappingProxyType({})

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

    def __init__(self, config: CatsConfig, *, label: str | None = None) -> None:
        """
        Args:
            config: The thresholds.
            label: Its name; None: by method and target, see :func:`cats.config.label_of`.
        """
        self._config = config
        target = config.target_sparsity
        self.label = label or label_of(config.method, target, config.target_bytes)
        self.settings = {
            "method": config.method,
            "target_sparsity": target,
            **({} if config.target_bytes is None else {"target_bytes": config.target_bytes}),
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
            value, realized, self.read = perplexity_and_shares(
                model, batches, losses=self.losses, share=True
            )
        self.dropped = sum(realized.values()) / len(realized)
        return value, mean_share(model, mlp_shares(model, self.read))


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
        self.read = self._way.read
        return value, share


class InputThresholds(Sparse):
    """Thresholds on the inputs of each matrix: the method ``teal``, chosen in a way of its own."""

    def __init__(self, config: CatsConfig, *, method: str, target: float) -> None:
        """
        Args:
            config: Thresholds of the method ``teal``.
            method: ``"input"``, or ``"teal"`` where TEAL's allocation chose them.
            target: Share of the weights that are not read, as calibration intended.
        """
        super().__init__(config, label=f"{method}-{target * 100:.3g}")
        by_mlp: dict[str, dict[str, float]] = {}
        for name, threshold in config.inputs.items():
            mlp, _, layer = name.rpartition(".")
            by_mlp.setdefault(mlp, {})[layer] = float(threshold[0])
        self.thresholds = by_mlp
        del self.settings["target_bytes"], self.settings["calibration_hash"]
        self.settings |= {
            "method": method,
            "target_sparsity": target,
            "thresholds": fingerprint.of_value(by_mlp),
        }

    def measure(self, model: nn.Module, batches: Iterable[Batch]) -> tuple[float, float]:
        value, share = super().measure(model, batches)
        self.dropped = None  # inputs are dropped, not neurons
        return value, share
