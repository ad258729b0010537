"""Put the operator ``cats::gated_mlp`` in the place of a model's sparse MLPs, and take it out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cats.errors import BackendError, UnsupportedModelError
from cats.functional import ACTIVATIONS, keep_mask
from cats.mlp import CatsActivation, GatedMLP, activation_kind, find_gated_mlps, probe_inputs
from cats.ops import BACKENDS, call, checked, dense, is_dense_batch, is_for_compiler, is_unwatched

M = TypeVar("M", bound=nn.Module)

# Largest relative error of the probe: both sides run the same GEMMs, so that only rounding differs.
_PROBE_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where an MLP keeps its weights.

    Attributes:
        gate: Name of the linear layer with the rows of gate.
        up: That of up; the same layer where both are stacked.
        down: That of down.
        gate_first: Whether the rows of gate come first in a stacked layer.
    """

    gate: str
    up: str
    down: str
    gate_first: bool = True


class FusedGatedMLP(nn.Module):
    """A sparse MLP that runs as one operator; its children are those of the MLP that it replaces.

    A call with few tokens reads only what kept neurons need; one with many runs dense GEMMs with
    the same thresholds. It has no gradient.
    """

    thresholds: Tensor

    def __init__(self, mlp: GatedMLP, layout: Layout, backend: str) -> None:
        super().__init__()
        self.layout = layout
        self.backend = backend
        self.activation_name = mlp.activation_name
        self.activation = _sparse_activation(mlp)
        self.intermediate_size = mlp.intermediate_size
        self._checked: Hashable = None
        self._function: Callable[..., Tensor] = call
        self._original = [mlp.module]  # in a list, so that its weights are not registered twice
        for name, child in mlp.module.named_children():
            self.add_module(name, child)
        self.training = mlp.module.training
        self._expand_thresholds()

    @property
    def original(self) -> nn.Module:
        """The MLP that was replaced."""
        return self._original[0]

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down, *biases = self.operands()
        thresholds = self._buffers["thresholds"]
        assert thresholds is not None
        rest: Any = thresholds, self.activation, "gate", *biases, None
        rows = x.reshape(-1, x.shape[-1])
        opens = self.backend == "auto" and is_for_compiler() and not torch.is_grad_enabled()
        if opens and is_dense_batch(rows):
            # GEMMs in the open, which a compiler fuses with what is around
            return dense.gated_mlp(rows, gate, up, down, *rest).view(x.shape)
        if not is_unwatched(rows):
            return call(rows, gate, up, down, *rest, self.backend).view(x.shape)
        # what was checked for these very tensors need not be checked again
        key = (
            rows.shape, rows.dtype, gate.shape, gate.dtype, gate.data_ptr(), up.data_ptr(),
            down.data_ptr(), thresholds.data_ptr(), rows.data_ptr() % 16,
        )  # fmt: skip
        if key != self._checked:
            self._function = checked(rows, gate, up, down, *rest, self.backend)
            self._checked = key
        return self._function(rows, gate, up, down, *rest).view(x.shape)

    def kept(self, x: Tensor) -> Tensor:
        """Which neurons a kernel keeps, ``[..., F]``: it compares the gate before rounding it."""
        gate, up, down = self._linears()
        weight = self._weights(gate, up, down)[0].float()
        bias = self._biases(gate, up, down)[0]
        g = nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
        a = ACTIVATIONS[self.activation](g)
        return keep_mask(a, self.thresholds) & (a != 0)

    def operands(self) -> tuple[Tensor, Tensor, Tensor, *tuple[Tensor | None, ...]]:
        """Gate, up and down as the operator takes them, then their biases."""
        linears = self._linears()
        return *self._weights(*linears), *self._biases(*linears)

    def extra_repr(self) -> str:
        return f"backend={self.backend}"

    def _linears(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        modules, layout = self._modules, self.layout
        gate, up, down = modules[layout.gate], modules[layout.up], modules[layout.down]
        # an adapter that was added later, or another activation, would be ignored in silence
        if not (
            type(gate) is type(up) is type(down) is nn.Linear
            and type(modules[self.activation_name]) is CatsActivation
        ):
            raise BackendError(
                "a layer of this fused MLP was replaced after fuse_ (by an adapter, quantisation "
                "or another activation): call cats.unfuse_(model) before changing its layers"
            )
        return gate, up, down

    def _weights(
        self, gate: nn.Linear, up: nn.Linear, down: nn.Linear
    ) -> tuple[Tensor, Tensor, Tensor]:
        # not as attributes, which a module looks up in Python
        gate_weight, up_weight = gate._parameters["weight"], up._parameters["weight"]
        down_weight = down._parameters["weight"]
        assert gate_weight is not None
        assert up_weight is not None
        assert down_weight is not None
        return (*_halves(self.layout, gate_weight, up_weight), down_weight)

    def _biases(
        self, gate: nn.Linear, up: nn.Linear, down: nn.Linear
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        gate_bias: Tensor | None = gate._parameters["bias"]
        up_bias: Tensor | None = up._parameters["bias"]
        if gate is up and gate_bias is not None:
            gate_bias, up_bias = _halves(self.layout, gate_bias, gate_bias)
        return gate_bias, up_bias, down._parameters["bias"]

    def _expand_thresholds(self) -> None:
        act = self._modules[self.activation_name]
        assert isinstance(act, CatsActivation)
        expanded = act.threshold.expand(self.intermediate_size).contiguous()
        self.register_buffer("thresholds", expanded, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedGatedMLP:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # from the activation, which keeps float32 whatever the dtype of the model
        self._expand_thresholds()
        return self


def fuse_(model: M, *, backend: str = "auto") -> M:
    """Run the sparse MLPs of a model as one operator each, in place, for fast decoding.

    An MLP is taken if a probe shows that it computes ``down(act(gate(x)) * up(x))``. The weight of
    ``down`` is laid out column by column, in place: same shape, same name, no second copy.

    Args:
        model: A sparse model; see :func:`cats.sparsify_`. Already fused MLPs stay.
        backend: ``"auto"``, or one of :data:`cats.ops.BACKENDS`, which must then run every call.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: If the model is dense, or an MLP computes another formula or has
            layers other than ``nn.Linear``; the model is then left as it was.
        BackendError: If there is no such backend.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise BackendError(f"backend must be auto or one of {', '.join(BACKENDS)}; got {backend!r}")
    names = {
        n.rpartition(".")[0] for n, m in model.named_modules() if isinstance(m, CatsActivation)
    }
    fused = {name for name, _ in fused_mlps(model)}
    if not names:
        raise UnsupportedModelError(
            "the model is dense: apply thresholds with cats.sparsify_ first"
        )
    if names == fused:
        return model
    pairs = [
        (mlp, FusedGatedMLP(mlp, _find_layout(mlp), backend))
        for mlp in find_gated_mlps(model, names=names - fused)
    ]
    for mlp, replacement in pairs:
        down = getattr(replacement, replacement.layout.down)
        # each neuron's column becomes contiguous; the parameter stays the same object
        down.weight.data = down.weight.data.t().contiguous().t()
        _replace(model, mlp.name, replacement)
    return model


def unfuse_(model: M) -> M:
    """Undo :func:`fuse_`, in place: the same modules and memory layout as before."""
    for name, fused in list(fused_mlps(model)):
        down = fused._modules[fused.layout.down]
        if isinstance(down, nn.Linear):
            down.weight.data = down.weight.data.contiguous()
        original = fused.original
        # a child that was replaced meanwhile, by an adapter for one, goes along
        for child, module in fused.named_children():
            original.add_module(child, module)
        _replace(model, name, original.train(fused.training))
    return model


def fused_mlps(model: nn.Module) -> Iterator[tuple[str, FusedGatedMLP]]:
    """Name and module of each fused MLP, in the order of the model."""
    for name, module in model.named_modules():
        if isinstance(module, FusedGatedMLP):
            yield name, module


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _sparse_activation(mlp: GatedMLP) -> str:
    assert isinstance(mlp.act, CatsActivation)
    kind = activation_kind(mlp.act.act)
    if kind not in ACTIVATIONS:
        raise UnsupportedModelError(f"{mlp.name}: no kernel computes its activation {kind}")
    return kind


def _halves(layout: Layout, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up, cut out of one tensor where they are stacked."""
    if layout.gate != layout.up:
        return gate, up
    first, second = gate.chunk(2)
    return (first, second) if layout.gate_first else (second, first)


def _find_layout(mlp: GatedMLP) -> Layout:
    """The arrangement of linear layers under which the operator computes what the MLP computes."""
    linears = {n: c for n, c in mlp.module.named_children() if type(c) is nn.Linear}
    others = [
        n
        for n, c in mlp.module.named_children()
        if n not in linears and any(True for _ in c.parameters())
    ]
    if others:
        kind = type(getattr(mlp.module, others[0])).__name__
        raise UnsupportedModelError(
            f"{mlp.name} cannot be fused: {others[0]} is {kind}, expected plain nn.Linear layers "
            "(merge adapters first)"
        )
    f, d = mlp.intermediate_size, mlp.hidden_size
    shapes = {name: tuple(c.weight.shape) for name, c in linears.items()}
    layouts = [
        Layout(gate, up, down)
        for gate, up, down in permutations(linears, 3)
        if (shapes[gate], shapes[up], shapes[down]) == ((f, d), (f, d), (d, f))
    ]
    layouts += [
        Layout(stacked, stacked, down, first)
        for stacked, down in permutations(linears, 2)
        if (shapes[stacked], shapes[down]) == ((2 * f, d), (d, f))
        for first in (True, False)
    ]
    for layout in layouts:
        if _computes(mlp, layout):
            return layout
    raise UnsupportedModelError(
        f"{mlp.name} cannot be fused: it does not compute down(act(gate(x)) * up(x)); "
        "the sparse model runs as it is, without fuse_"
    )


def _computes(mlp: GatedMLP, layout: Layout) -> bool:
    fused = FusedGatedMLP(mlp, layout, "dense")
    gate, up, down = fused._linears()
    for x in probe_inputs(mlp):
        with torch.no_grad():
            expected = mlp.module(x).flatten(0, 1)
            weights, biases = fused._weights(gate, up, down), fused._biases(gate, up, down)
            actual = dense.gated_mlp(
                x.flatten(0, 1), *weights, fused.thresholds, fused.activation, "gate", *biases
            )
        error = (actual - expected).float().norm()
        if not error <= _PROBE_TOLERANCE.get(x.dtype, 1e-5) * expected.float().norm():
            return False
    return True
