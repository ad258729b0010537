"""Ways to run one model that are compared: dense, sparse by neuron, sparse by input.

Everything that evaluates takes a :class:`Variant` and does not know which one it is. Another
method is one more small class here, or a method of :mod:`cats.methods` that :class:`Sparse` runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cats import fingerprint
from cats.apply import densify_, sparsify_
from cats.config import CatsConfig, label_of
from cats.data import Batch
from cats.evaluation.traffic import mean_share, neuron_shares
from cats.functional import keep_mask
from cats.metrics import perplexity, perplexity_and_sparsity
from cats.model import find_gated_mlps


class Variant(ABC):
    """One way to run a dense model.

    Attributes:
        label: What tables and file names call it, such as ``"cats-50"``.
        settings: What its answers depend on.
        dropped: Mean share of neurons that its last measurement dropped; None if it drops none.
    """

    label: str
    settings: dict[str, str | int | float | bool | None]
    dropped: float | None = None

    @abstractmethod
    def on(self, model: Any) -> Any:
        """Context in which the dense ``model`` runs this way; afterwards it is dense again."""

    @abstractmethod
    def measure(self, model: Any, batches: Iterable[Batch]) -> tuple[float, float]:
        """Perplexity, and the share of the gated MLPs' weights that a token reads."""


class Dense(Variant):
    """The model as it is."""

    def __init__(self) -> None:
        self.label = "dense"
        self.settings = {"method": "dense", "target_sparsity": None}

    @contextmanager
    def on(self, model: Any) -> Iterator[Any]:
        yield model

    def measure(self, model: Any, batches: Iterable[Batch]) -> tuple[float, float]:
        return perplexity(model, batches), 1.0


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
    def on(self, model: Any) -> Iterator[Any]:
        try:
            yield sparsify_(model, self._config)
        finally:
            densify_(model)

    def measure(self, model: Any, batches: Iterable[Batch]) -> tuple[float, float]:
        with self.on(model):
            value, realized = perplexity_and_sparsity(model, batches)
        self.dropped = sum(realized.values()) / len(realized)
        return value, mean_share(model, neuron_shares(model, realized))


class InputThresholds(Variant):
    """Input thresholding: small entries of each matrix's input are dropped (arXiv:2408.14690).

    A column of a matrix whose input entry is dropped need not be read. For comparison only: there
    is no kernel for it here.
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
            target: Share of the weights that calibration aimed to leave unread.
            calibration_tokens: How many tokens were seen.
        """
        self._thresholds = thresholds
        self.label = f"{method}-{target * 100:.3g}"
        self.settings = {
            "method": method,
            "target_sparsity": target,
            "calibration_tokens": calibration_tokens,
            "thresholds": fingerprint.of_value(thresholds),
        }
        # per layer: the sum over tokens of the share of inputs that were kept, and the tokens
        self._read: dict[str, Tensor | float] = {}
        self._tokens: dict[str, int] = {}

    @contextmanager
    def on(self, model: Any) -> Iterator[Any]:
        with ExitStack() as stack:
            for mlp, thresholds in self._thresholds.items():
                for name, threshold in thresholds.items():
                    layer = model.get_submodule(f"{mlp}.{name}")
                    hook = self._hook(f"{mlp}.{name}", threshold)
                    stack.callback(layer.register_forward_pre_hook(hook).remove)
            yield model

    def measure(self, model: Any, batches: Iterable[Batch]) -> tuple[float, float]:
        self._read, self._tokens = {}, {}
        with self.on(model):
            value = perplexity(model, batches)
        shares = {}
        for mlp in find_gated_mlps(model, names=self._thresholds):
            read = 0.0
            for layer, matrix in mlp.matrices.items():
                name = f"{mlp.name}.{layer}"
                read += matrix.bytes * float(self._read[name]) / self._tokens[name]
            shares[mlp.name] = read / mlp.bytes
        return value, mean_share(model, shares)

    def _hook(self, name: str, threshold: float) -> Any:
        def drop(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            kept = keep_mask(args[0], threshold)
            self._read[name] = self._read.get(name, 0.0) + kept.float().mean(-1).sum()
            self._tokens[name] = self._tokens.get(name, 0) + kept[..., 0].numel()
            return args[0].masked_fill(~kept, 0), *args[1:]

        return torch.no_grad()(drop)
