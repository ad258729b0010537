"""The thresholds of a checkpoint on their way through vLLM's loader: none may be lost."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from cats.errors import FormatError, ModelMismatchError
from cats.integrations.vllm.activation import SparseActAndMul
from cats.integrations.vllm.block import Sparsity

_ADVICE = "this release of the plugin cannot serve it; cats serve runs the model on one machine"


class ThresholdLoading:
    """Follows the thresholds of one checkpoint.

    Attributes:
        sparsity: What ``config.json`` says.
    """

    def __init__(
        self,
        sparsity: Sparsity,
        activations: dict[str, SparseActAndMul],
        *,
        absent_layers: Sequence[str] = (),
        source: str,
    ) -> None:
        """
        Args:
            sparsity: What ``config.json`` says.
            activations: Qualified name of each activation in vLLM's model, and the module.
            absent_layers: Names of layers that another process of the pipeline holds.
            source: Name of the checkpoint, for messages.
        """
        self.sparsity = sparsity
        self._activations, self._source = activations, source
        self._absent_layers = {number for name in absent_layers if (number := _layer(name))}
        # activation of the checkpoint: names of its tensors
        self._seen: dict[str, set[str]] = {}
        self._children = {name.rpartition(".")[2] for name in activations}

    def renamed(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights, with thresholds under the name of the activation in vLLM's class.

        The name of an MLP may differ as well; vLLM's own mapping of names knows that.
        """
        child = min(self._children, default="act_fn")
        for name, tensor in weights:
            parent, _, tail = name.rpartition(".")
            if tail in self.sparsity.form.tensors:
                self._seen.setdefault(parent, set()).add(tail)
                name = f"{parent.rpartition('.')[0]}.{child}.{tail}"
            yield name, tensor

    def check(self) -> None:
        """Raise an error unless each threshold of the checkpoint is where it belongs.

        Raises:
            FormatError: If the checkpoint lacks thresholds that its ``cats`` block names.
            ModelMismatchError: If vLLM's model did not take a threshold.
        """
        tensors = set(self.sparsity.form.tensors)
        mlps = {parent.rpartition(".")[0] for parent in self._seen}
        if missing := sorted(self.sparsity.mlps - mlps):
            raise FormatError(
                f"{self._source}: the thresholds of {len(missing)} MLPs are missing, such as "
                f"{missing[0]}; save the sparse model again"
            )
        if not self._seen:
            raise FormatError(
                f"{self._source}: config.json has a cats block, but no thresholds are stored"
            )
        for parent, names in self._seen.items():
            if names != tensors:
                lacking = min(tensors - names)
                raise FormatError(f"{self._source}: {parent}.{lacking} is missing; save it again")
        expected = [name for name in self._seen if _layer(name) not in self._absent_layers]
        taken = [name for name, act in self._activations.items() if act.loaded == tensors]
        if len(taken) != len(expected):
            layers = {_layer(name) for name in taken}
            lost = [name for name in expected if _layer(name) not in layers] or expected
            raise ModelMismatchError(
                f"{self._source}: vLLM's model took the thresholds of {len(taken)} MLPs of "
                f"{len(expected)}, not those of {lost[0]}: {_ADVICE}"
            )

    def dense_mlps(self) -> list[str]:
        """Names of the activations without a threshold: their MLPs are dense in the checkpoint."""
        return [name for name, act in self._activations.items() if not act.loaded]


def absent_layers(model: nn.Module) -> list[str]:
    """Names of the modules that another process of the pipeline holds."""
    return [n for n, m in model.named_modules() if type(m).__name__ == "PPMissingLayer"]


def _layer(name: str) -> str | None:
    """The number of the layer in a qualified name."""
    found = re.search(r"\.(\d+)(\.|$)", name)
    return found and found[1]
