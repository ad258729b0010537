"""Make a model sparse with a config, and dense again, in place."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cats.config import CatsConfig
from cats.errors import ConfigError, ModelMismatchError, UnsupportedModelError
from cats.fusion import restore_layout_, take_out_
from cats.methods import Method, get_method
from cats.model import CatsActivation, GatedMLP, find_gated_mlps, restore_, unswap_
from cats.protocols import ModelConfig
from cats.undo import unchanged_on_error
from cats.weights import mask_inputs_, unmask_inputs_, weight_of
from cats.weights.placement import has_weights

M = TypeVar("M", bound=nn.Module)

# A change of dtype moves a weight by less than 1 %; weights of another model differ by more.
_FINGERPRINT_TOLERANCE = 0.02


def sparsify_(model: M, config: CatsConfig) -> M:
    """Apply ``config`` to ``model`` in place, and record it in ``model.config.cats``.

    Weights and their names do not change: ``model.save_pretrained`` still writes a checkpoint that
    plain transformers loads as the dense model, beside float32 tensors ``<mlp>.act_fn.threshold``
    and ``<layer>.input_threshold``. Layers that the config does not name stay dense. In a sparse
    model, the new thresholds replace the old ones; a fused model is unfused. A call that fails
    leaves the model as it was.

    Returns:
        The same model.

    Raises:
        ModelMismatchError: If the config names other MLPs, other sizes or other weights.
        ConfigError: If it holds tensors that its method does not use.
        UnsupportedModelError: If the model has no gated MLP.
    """
    method = get_method(config.method, config.release)
    if config.router != method.router:
        raise ConfigError(
            f"method {config.method!r} puts its thresholds on {method.router}, the config says "
            f"{config.router!r}: it comes from a newer release or another program"
        )
    for name, tensors in config.tensors.items():
        if unknown := tensors.keys() - method.tensors:
            raise ConfigError(
                f"{name}.{min(unknown)}: method {config.method!r} has no such tensor, only "
                f"{', '.join(sorted(method.tensors))}: it comes from a newer release or another "
                "program"
            )
    with unchanged_on_error(model):
        fused = take_out_(model)
        mlps = _matching_mlps(model, config)
        for mlp in mlps.values():
            _check_inputs(mlp, config, method)
        _restore(model, except_for=config.tensors)
        for name, threshold in config.inputs.items():
            mask_inputs_(_linear_layer(model, name), threshold, name=name)
        for name, tensors in config.tensors.items():
            method.apply_(mlps[name], tensors)
            _check_stored(mlps[name], tensors, config.method)
        _record(model, config.to_dict())
        restore_layout_(fused)
    return model


def densify_(model: M) -> M:
    """Take the thresholds off, in place; the model is the dense one again, bit for bit.

    A call that fails leaves the model sparse.
    """
    with unchanged_on_error(model):
        fused = take_out_(model)
        _restore(model)
        _record(model, None)
        restore_layout_(fused)
    return model


def _check_stored(mlp: GatedMLP, tensors: Mapping[str, Tensor], method: str) -> None:
    """A saved model is loaded through ``apply_`` again: what it stores must be what it got."""
    for name, tensor in tensors.items():
        stored = getattr(mlp.act, name, None)
        if not isinstance(stored, Tensor) or stored.is_meta or tensor.is_meta:
            continue
        if not torch.equal(stored.detach().cpu(), tensor.to("cpu", stored.dtype)):
            raise ConfigError(
                f"method {method!r} stores another {name} in {mlp.name} than it was given, which "
                "a saved model would change again: apply_ must store its tensors unchanged"
            )


def _restore(model: nn.Module, except_for: Container[str] = ()) -> None:
    """Let all layers take all inputs, and make MLPs dense again, except for the named ones."""
    for name, module in list(model.named_modules()):
        unmask_inputs_(module)
        for child, act in list(module.named_children()):
            if isinstance(act, CatsActivation) and name not in except_for:
                restore_(module, child, act.dense)
                unswap_(module)


def _check_inputs(mlp: GatedMLP, config: CatsConfig, method: Method) -> None:
    """Refuse thresholds on inputs of an MLP that are not those of the method.

    Raises:
        ConfigError: If a layer has some and should not, or lacks them.
        UnsupportedModelError: If the MLP stacks gate and up, and only one of them should have some.
    """
    expected = set()
    if method.masked:
        layout = mlp.known_layout()
        stacked = layout.gate == layout.up
        if stacked and len({"gate", "up"} & {*method.masked}) == 1:
            raise UnsupportedModelError(
                f"{mlp.name}: gate and up are one layer, {layout.gate}, and method "
                f"{method.name!r} drops inputs of gate alone: use another method, such as two-stage"
            )
        expected = {f"{mlp.name}.{getattr(layout, part)}" for part in method.masked}
    actual = {name for name in config.inputs if name.rpartition(".")[0] == mlp.name}
    if wrong := sorted(actual ^ expected):
        verb = "has no" if wrong[0] in actual else "needs"
        raise ConfigError(
            f"method {method.name!r} {verb} thresholds on the inputs of {wrong[0]}: these are of "
            "another method, from a newer release or another program; calibrate the model again"
        )


def _linear_layer(model: nn.Module, name: str) -> nn.Module:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if layer is None or weight_of(layer) is None:
        raise ModelMismatchError(
            f"{type(model).__name__} has no linear layer {name}, whose inputs have thresholds: "
            "calibrate this model with cats calibrate, or load the model of the thresholds"
        )
    return layer


def _record(model: nn.Module, block: dict[str, Any] | None) -> None:
    """Record what is applied in ``model.config.cats``; None removes the record."""
    config: ModelConfig | None = getattr(model, "config", None)
    if config is None:
        return
    if block is not None:
        config.cats = block
    elif hasattr(config, "cats"):
        del config.cats


def _matching_mlps(model: nn.Module, config: CatsConfig) -> dict[str, GatedMLP]:
    """The MLPs that the config names.

    Raises:
        ModelMismatchError: If one is missing, or its size or weights differ.
    """
    advice = "calibrate this model with cats calibrate, or load the model of the thresholds"
    modules = dict(model.named_modules())
    if missing := [name for name in config.tensors if name not in modules]:
        raise ModelMismatchError(
            f"{type(model).__name__} lacks {len(missing)} of the {len(config.tensors)} MLPs that "
            f"the thresholds name, such as {missing[0]}: {advice}"
        )
    mlps = {mlp.name: mlp for mlp in find_gated_mlps(model, names=config.tensors)}
    for name, tensors in config.tensors.items():
        if name not in mlps:
            raise ModelMismatchError(f"{name} is not a gated MLP in this model: {advice}")
        for key, tensor in tensors.items():
            if not mlps[name].fits(tensor):
                raise ModelMismatchError(
                    f"{name}.{key} has the shape {list(tensor.shape)} for {mlps[name].size}: "
                    f"{advice}"
                )
        expected = config.fingerprints.get(name)
        if expected is None or not has_weights(mlps[name].module):
            continue
        actual = mlps[name].fingerprint()
        tolerance = _FINGERPRINT_TOLERANCE * float(expected.abs().max())
        if actual.shape != expected.shape or not torch.allclose(
            actual, expected, rtol=0, atol=tolerance
        ):
            raise ModelMismatchError(f"the weights of {name} are not the calibrated ones: {advice}")
    return mlps
