"""Fuse and unfuse all sparse MLPs of a model, in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from torch import nn

from cats.errors import BackendError, UnsupportedModelError
from cats.fusion.base import FusedMLP
from cats.fusion.mlp import FusedGatedMLP
from cats.fusion.packed import FusedPackedMLP, packed_unless_error
from cats.model import CatsActivation, RoutedExperts, find_gated_mlps, share_hooks
from cats.model.fusable import check_fusable, check_memory, is_quantised_mlp
from cats.ops import BACKENDS
from cats.undo import lay_out_, unchanged_on_error

M = TypeVar("M", bound=nn.Module)


def fuse_(model: M, *, backend: str = "auto") -> M:
    """Run the sparse MLPs of a model as one operator each, in place, for fast decoding.

    An MLP is taken if a probe shows that it computes ``down(act(gate(x)) * up(x))``. The weight of
    ``down``, and that of ``gate`` where it drops inputs, is laid out column by column, in place:
    same shape, same name, no second copy. Masks of layers outside of MLPs run as they are. Codes of
    quantised layers are packed, in place; they are saved and loaded as before. The stacked experts
    of a mixture stay as they are, sparse; its other MLPs are fused.

    Args:
        model: A sparse model; see :func:`cats.sparsify_`. Already fused MLPs stay.
        backend: ``"auto"``, or one of :data:`cats.ops.BACKENDS`, which must then run every call.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: If the model is dense, or an MLP computes another formula, has hooks
            on its layers, or layers other than ``nn.Linear`` with ordinary weights or quantised
            ones that kernels read. Hooks on the MLP itself go along.
        BackendError: If there is no such backend.

    A call that fails leaves the model as it was.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise BackendError(f"backend must be auto or one of {', '.join(BACKENDS)}; got {backend!r}")
    modules = dict(model.named_modules())
    sparse = {
        name.rpartition(".")[0] for name, m in modules.items() if isinstance(m, CatsActivation)
    }
    experts = {name for name in sparse if isinstance(modules[name], RoutedExperts)}
    fused = dict(fused_mlps(model))
    if not sparse:
        raise UnsupportedModelError(
            "the model is dense: apply thresholds with cats.sparsify_ first"
        )
    if sparse == experts:
        raise UnsupportedModelError(
            "no kernel computes stacked experts, and the model has no other sparse MLP: it runs "
            "as it is, without fuse_"
        )
    if sparse - experts == fused.keys():
        return model
    if "" in sparse:
        raise UnsupportedModelError(
            f"{type(model).__name__} is itself the MLP, and the fused MLP needs a parent module: "
            "put it into one, such as nn.Sequential"
        )
    mlps = find_gated_mlps(model, names=sparse - experts - fused.keys())
    for mlp in mlps:
        check_fusable(mlp)
    packed = [FusedPackedMLP(mlp, backend) for mlp in mlps if is_quantised_mlp(mlp)]
    dense = [FusedGatedMLP(mlp, backend) for mlp in mlps if not is_quantised_mlp(mlp)]
    strides = {
        id(weight): module.strides[name][1]
        for module in fused.values()
        if isinstance(module, FusedGatedMLP)
        for name, weight in module.column_weights.items()
    }
    check_memory(model, [weight for module in dense for weight in module.column_weights.values()])
    replacements: list[FusedMLP] = [*dense, *packed]
    with packed_unless_error(packed), unchanged_on_error(model):
        for module in dense:
            for name, weight in module.column_weights.items():
                shape, stride = module.strides[name]
                # a weight that two MLPs share is laid out already
                module.strides[name] = shape, strides.setdefault(id(weight), stride)
                # each column becomes contiguous; the parameter stays the same object
                lay_out_(weight, (1, len(weight)))
        for replacement in replacements:
            # kernels read one threshold per neuron
            replacement.widen_thresholds_()
        _replace(model, {replacement.original: replacement for replacement in replacements})
    return model


def unfuse_(model: M) -> M:
    """Undo :func:`fuse_`, in place: the same modules and memory layout as before.

    A call that fails leaves the model fused.
    """
    fused = [module for _, module in fused_mlps(model)]
    if not fused:
        return model
    with unchanged_on_error(model):
        take_out_(model)
        restore_layout_(fused)
    return model


def take_out_(model: nn.Module) -> list[FusedMLP]:
    """Put the original MLPs back, and return the fused ones; no weight is moved."""
    fused = [module for _, module in fused_mlps(model)]
    for module in fused:
        # hooks and mode may have changed since fuse_; children are the same dictionary
        share_hooks(module, module.original)
        module.original.training = module.training
    _replace(model, {module: module.original for module in fused})
    return fused


def restore_layout_(fused: Iterable[FusedMLP]) -> None:
    """Give the weights of MLPs that were taken out the memory layout that they had before."""
    for module in fused:
        if isinstance(module, FusedPackedMLP):
            for layer in module.quantised_layers:
                layer.unpack_()
        elif isinstance(module, FusedGatedMLP):
            for name, (shape, stride) in module.strides.items():
                weight = getattr(module._modules[name], "weight", None)
                # not a weight that was replaced since, by quantisation or another size
                if type(weight) is nn.Parameter and weight.shape == shape:
                    lay_out_(weight, stride)
        act = module._modules.get(module.activation_name)
        if isinstance(act, CatsActivation):
            act.narrow_()


def fused_mlps(model: nn.Module) -> Iterator[tuple[str, FusedMLP]]:
    """Name and module of each fused MLP, in the order of the model."""
    for name, module in model.named_modules():
        if isinstance(module, FusedMLP):
            yield name, module


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules wherever a parent holds them."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
