"""Whether one operator can replace an MLP: its layers, its memory, what it computes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn

from cats.errors import UnsupportedModelError
from cats.model.mlp import GatedMLP, GatedOperands
from cats.model.modules import evaluating, is_hooked
from cats.model.packable import check_packable
from cats.ops import GatedMLPArguments
from cats.ops.mlp import dense
from cats.weights import Dense, Foreign, Packed, Quantised, unmasked_class, weight_of
from cats.weights.placement import has_weights, is_offloaded

# Largest relative error of the probe: both sides run the same GEMMs, so that only rounding differs.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def check_fusable(mlp: GatedMLP) -> None:
    """
    Raises:
        UnsupportedModelError: If the operator would compute something else than the MLP; the
            message says why.
    """
    if reason := _unfusable(mlp):
        raise UnsupportedModelError(f"{mlp.name} cannot be fused: {reason}")
    if mlp.layout is not None and (reason := _masked(mlp)):
        raise UnsupportedModelError(f"{mlp.name} cannot be fused: {reason}")
    if mlp.layout is not None and (reason := _unpackable(mlp)):
        raise UnsupportedModelError(f"{mlp.name} cannot be fused: {reason}")
    if mlp.layout is None or not _computes(mlp):
        raise UnsupportedModelError(
            f"{mlp.name} cannot be fused: it does not compute down(act(gate(x)) * up(x)); "
            "the sparse model runs as it is, without fuse_"
        )


def is_quantised_mlp(mlp: GatedMLP) -> bool:
    """Whether its layers hold codes."""
    return any(isinstance(matrix, Quantised | Packed) for matrix in mlp.matrices.values())


def check_memory(model: nn.Module, weights: Iterable[nn.Parameter]) -> None:
    """Raise UnsupportedModelError where another tensor lies in the memory of one of the weights."""
    # storage to (first byte, end, id, name) of each tensor in it
    spans: dict[int, list[tuple[int, int, int, str]]] = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.layout is torch.strided and not tensor.is_meta and tensor.numel():
            strides = zip(tensor.shape, tensor.stride(), strict=True)
            elements = 1 + sum((n - 1) * stride for n, stride in strides)
            start = tensor.data_ptr()
            span = (start, start + elements * tensor.element_size(), id(tensor), name)
            spans.setdefault(tensor.untyped_storage().data_ptr(), []).append(span)
    for weight in weights:
        neighbours = spans[weight.untyped_storage().data_ptr()]
        first, stop, _, weight_name = next(s for s in neighbours if s[2] == id(weight))
        for start, end, tensor_id, name in neighbours:
            if tensor_id != id(weight) and start < stop and first < end:
                raise UnsupportedModelError(
                    f"{weight_name} and {name} are two tensors in the same memory, which fuse_ "
                    "would separate: give both layers the same nn.Parameter, or a copy each"
                )


def _unfusable(mlp: GatedMLP) -> str | None:
    """Why one operator cannot replace an MLP, whatever it computes; or None."""
    module = mlp.module
    if is_offloaded(module):
        return "its weights are offloaded: load the whole model into memory (without device_map)"
    if not has_weights(module):
        return "its weights are on meta: load them first"
    own_tensors = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    for name, _ in own_tensors:
        return f"it holds a tensor of its own, {name}"
    for name, child in module.named_children():
        tensors = [*child.parameters(), *child.buffers()]
        if name == mlp.activation_name or not tensors:
            continue
        weight = weight_of(child)
        if isinstance(weight, Dense):
            bias = child._parameters.get("bias")
            if bias is None or (type(bias) is nn.Parameter and bias.is_floating_point()):
                continue
        elif isinstance(weight, Quantised | Packed):
            continue
        elif weight is not None and not isinstance(weight, Foreign):
            return f"{name} is a {weight!r}, which no kernel takes"
        is_linear = unmasked_class(child) is nn.Linear
        if is_linear and "weight" not in child._parameters:
            return f"the weight of {name} is computed from others (by pruning or a weight norm)"
        if is_linear:
            kinds = (f"{type(t).__name__} of {t.dtype}" for t in tensors)
            return f"{name} holds {', '.join(kinds)}, expected ordinary floating-point weights"
        kind = type(child).__name__
        return (
            f"{name} is {kind}, expected plain nn.Linear or quantised layers: merge or remove "
            "adapters first"
        )
    for name, child in module.named_modules():
        if name and is_hooked(child):
            return f"{name} has a hook, which the operator would not run: hook the MLP itself"
    return None


def _masked(mlp: GatedMLP) -> str | None:
    """Which masks no kernel reads; None where there are none of them."""
    operands, as_it_is = mlp.operands(), "the sparse model runs as it is, without fuse_"
    if operands.up_inputs is not None:
        return f"it drops inputs of up, which no kernel does yet; {as_it_is}"
    if operands.gate_inputs is None:
        return None
    if operands.router != "gate":
        return f"it drops inputs of gate, and its router is {operands.router}; {as_it_is}"
    if is_quantised_mlp(mlp):
        return f"it drops inputs of gate, whose codes kernels read by rows; {as_it_is}"
    return None


def _unpackable(mlp: GatedMLP) -> str | None:
    """Why no kernel reads the codes of an MLP; None where one does, or where it is dense."""
    try:
        check_packable(mlp.operands(), "it")
    except UnsupportedModelError as error:
        return str(error)
    return None


def _arguments(x: Tensor, operands: GatedOperands) -> GatedMLPArguments:
    gate, up, down = operands.gate, operands.up, operands.down
    return GatedMLPArguments(
        x,
        gate.matrix.dequantised(),
        up.matrix.dequantised(),
        down.matrix.dequantised(),
        operands.thresholds,
        operands.activation,
        operands.router,
        gate.bias,
        up.bias,
        down.bias,
        operands.product_thresholds,
        operands.gate_inputs,
    )


def _computes(mlp: GatedMLP) -> bool:
    """Whether the operator gives what the MLP gives, up to rounding."""
    operands = mlp.operands()
    for x in mlp.probe_inputs():
        with evaluating(mlp.module), torch.no_grad():
            # without the hooks of the MLP itself, which also run around the operator
            expected = mlp.module.forward(x).flatten(0, 1)
            actual = dense.gated_mlp(_arguments(x.flatten(0, 1), operands))
        error = (actual - expected).float().norm()
        if not error <= _TOLERANCE.get(x.dtype, 1e-5) * expected.float().norm():
            return False
    return True
