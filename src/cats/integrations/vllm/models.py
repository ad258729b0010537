"""vLLM's own model classes, with thresholds: what the registry loads instead of them."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import vllm.envs as envs
from torch import Tensor, nn
from vllm.logger import init_logger

from cats.errors import ModelMismatchError
from cats.integrations.vllm.activation import SparseActAndMul
from cats.integrations.vllm.block import Sparsity
from cats.integrations.vllm.layers import FusedStackedMLP, can_fuse
from cats.integrations.vllm.loading import ThresholdLoading, absent_layers
from cats.integrations.vllm.mlps import StackedMLP, find_mlps

_logger = init_logger("vllm.cats")


def __getattr__(name: str) -> type[nn.Module]:
    """The sparse class of ``"<module> <class> <release of vLLM>"``."""
    module, separator, rest = name.partition(" ")
    if not separator:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = sparse_class(getattr(importlib.import_module(module), rest.partition(" ")[0]))
    globals()[name] = made
    return made


def sparse_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass that runs CATS checkpoints; of all others it makes instances of ``base``."""

    class Sparse(base):  # type: ignore[misc, valid-type]
        def __new__(cls, *args: Any, vllm_config: Any = None, **kwargs: Any) -> Any:
            # a subclass, such as one for embeddings, needs an instance of itself
            if cls is Sparse and vllm_config is not None and _block(vllm_config, base) is None:
                return base(*args, vllm_config=vllm_config, **kwargs)
            return super().__new__(cls)

        def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            self._cats = None
            if (block := _block(vllm_config, base)) is not None:
                self._cats = SparseModel(self, block, vllm_config)

        def load_weights(self, weights: Iterable[tuple[str, Tensor]], *args: Any) -> Any:
            if self._cats is None:
                return super().load_weights(weights, *args)
            loaded = super().load_weights(self._cats.loading.renamed(weights), *args)
            self._cats.finish_()
            return loaded

    Sparse.__name__ = base.__name__
    Sparse.__qualname__ = base.__qualname__
    return Sparse


def _block(vllm_config: Any, base: type[nn.Module]) -> Any:
    """The ``cats`` block, if this class is the model of the checkpoint and not its draft."""
    config = vllm_config.model_config.hf_config
    names = {*(getattr(config, "architectures", None) or ()), vllm_config.model_config.architecture}
    return getattr(config, "cats", None) if base.__name__ in names else None


class SparseModel:
    """What the plugin changes in one vLLM model.

    Attributes:
        loading: Follows the thresholds while the weights are loaded.
    """

    def __init__(self, model: nn.Module, block: Any, vllm_config: Any) -> None:
        source = vllm_config.model_config.model
        sparsity = Sparsity.of(block, source)
        self._model = model
        self._mlps = {mlp.name: mlp for mlp in find_mlps(model)}
        self._dense_acts = {name: mlp.child(mlp.act) for name, mlp in self._mlps.items()}
        self._why_exact = _why_exact(vllm_config)
        self._is_complete = False
        activations = {}
        for name, mlp in self._mlps.items():
            act = SparseActAndMul(
                sparsity.form, mlp.activation, size=mlp.size, rank=mlp.rank, ranks=mlp.ranks
            )
            setattr(mlp.module, mlp.act, act)
            activations[f"{name}.{mlp.act}"] = act
        self.loading = ThresholdLoading(
            sparsity, activations, absent_layers=absent_layers(model), source=source
        )
        if not activations and not absent_layers(model):
            raise ModelMismatchError(
                f"{source}: no gated MLP was found in vLLM's {type(model).__name__}, which has to "
                "run the thresholds: cats serve runs the model on one machine"
            )

    def finish_(self) -> None:
        """Check what was loaded, and let the operator run the MLPs that it can."""
        # weights may come in parts later, when a trainer sends new ones
        if self._is_complete:
            return
        self.loading.check()
        self._is_complete = True
        dense = set(self.loading.dense_mlps())
        fused = 0
        for name, mlp in self._mlps.items():
            if f"{name}.{mlp.act}" in dense:
                setattr(mlp.module, mlp.act, self._dense_acts[name])
            elif self._why_exact is None and can_fuse(mlp):
                _replace_(self._model, mlp, FusedStackedMLP(mlp))
                fused += 1
        sparse = len(self._mlps) - len(dense)
        exact = "" if fused == sparse else f"; {self._why_exact or 'others'} on the exact path"
        _logger.info(
            "CATS: %s, %d sparse MLPs in this process, %d by cats::gated_mlp%s",
            self.loading.sparsity.label,
            sparse,
            fused,
            exact,
        )


def _why_exact(vllm_config: Any) -> str | None:
    """Why no MLP of a model may run as one operator, or None."""
    if vllm_config.lora_config is not None:
        return "adapters (LoRA) need all layers, so all MLPs run"
    if envs.VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT forbids kernels that depend on the batch, so all MLPs run"
    return None


def _replace_(model: nn.Module, mlp: StackedMLP, module: nn.Module) -> None:
    parent, _, child = mlp.name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
