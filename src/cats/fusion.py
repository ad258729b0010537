"""Put the operator ``cats::gated_mlp`` in the place of a model's sparse MLPs, and take it out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from cats.errors import BackendError, UnsupportedModelError
from cats.functional import ACTIVATIONS, keep_mask
from cats.model import (
    CatsActivation,
    GatedMLP,
    Layout,
    Replacement,
    find_gated_mlps,
    has_other_forward,
    is_hooked,
    share_hooks,
)
from cats.model.fusable import check_fusable, check_memory
from cats.ops import (
    BACKENDS,
    GatedMLPArguments,
    call,
    checked,
    is_dense_batch,
    is_for_compiler,
    is_unwatched,
)
from cats.ops.mlp import dense
from cats.undo import lay_out_, unchanged_on_error

M = TypeVar("M", bound=nn.Module)


class FusedGatedMLP(Replacement):
    """A sparse MLP that runs as one operator; its children are those of the MLP that it replaces.

    A call with few tokens reads only what kept neurons need; one with many runs dense GEMMs with
    the same thresholds. It has no gradient. Under autocast the MLP runs as it was.
    """

    def __init__(self, mlp: GatedMLP, backend: str) -> None:
        super().__init__()
        self.layout = layout = mlp.known_layout()
        self.backend = backend
        self.activation_name = mlp.activation_name
        self.activation = mlp.operands().activation
        self.router: str = mlp.act.router  # type: ignore[assignment]
        self.intermediate_size = mlp.intermediate_size
        self._argument = next(iter(inspect.signature(mlp.module.forward).parameters), "x")
        self._has_dropout = any(isinstance(m, _DropoutNd) and m.p for m in mlp.module.children())
        down = getattr(mlp.module, layout.down).weight
        self._shape, self._stride = down.shape, down.stride()
        act: Any = mlp.act
        self._inner = type(act.act), getattr(act.act, "approximate", None)
        self._checked: Hashable = None
        self._function: Callable[[GatedMLPArguments], Tensor] = dense.gated_mlp
        self._original = [mlp.module]  # in a list, so that its weights are not registered twice
        # the same dictionary: a child that is replaced here is replaced there
        self._modules = mlp.module._modules
        self.training = mlp.module.training
        share_hooks(mlp.module, self)

    @property
    def original(self) -> nn.Module:
        """The MLP that was replaced."""
        return self._original[0]

    @property
    def thresholds(self) -> Tensor:
        """``[F]``, float32: the buffer of the activation itself, which cannot be out of date."""
        act: Any = self._modules[self.activation_name]
        thresholds: Tensor | None = act._buffers.get("threshold")
        if thresholds is None or thresholds.ndim != 1:
            return act.widen_(self.intermediate_size)  # type: ignore[no-any-return]
        return thresholds

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        if x is None or named:
            x = self._named_argument(x, named)
        gate, up, down, gate_bias, up_bias, down_bias = self.operands()
        if self._has_dropout and self.training:
            raise BackendError(
                "this fused MLP is in training mode and has dropout, which the operator does not "
                "compute: call model.eval() or cats.unfuse_(model)"
            )
        kind = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type
        if torch.is_autocast_enabled(kind):
            return self._run_original(x)
        act: Any = self._modules[self.activation_name]
        thresholds = act._buffers.get("threshold")
        if thresholds is None or thresholds.ndim != 1:
            thresholds = self.thresholds
        product_thresholds = act._buffers["product_threshold"]
        rows = x.reshape(-1, x.shape[-1])
        arguments = GatedMLPArguments(
            rows, gate, up, down, thresholds, self.activation, self.router,
            gate_bias, up_bias, down_bias, product_thresholds,
        )  # fmt: skip
        opens = self.backend == "auto" and is_for_compiler() and not torch.is_grad_enabled()
        if opens and is_dense_batch(rows):
            # GEMMs in the open, which a compiler fuses with what is around
            return dense.gated_mlp(arguments).view(x.shape)
        if not is_unwatched(rows):
            try:
                return call(arguments, self.backend).view(x.shape)
            except RuntimeError:
                # a C++ kernel says less about what does not fit
                checked(arguments, self.backend)
                raise
        # what was checked for these very tensors need not be checked again
        key = (
            rows.shape, rows.dtype, gate.shape, gate.dtype, gate.data_ptr(), up.data_ptr(),
            down.data_ptr(), down.stride(0), thresholds.data_ptr(), rows.data_ptr() % 16,
            product_thresholds is None or product_thresholds.data_ptr(),
        )  # fmt: skip
        if key != self._checked:
            self._function = checked(arguments, self.backend)
            self._checked = key
        return self._function(arguments).view(x.shape)

    def kept(self, x: Tensor) -> Tensor:
        """Neurons of which a kernel reads both rows, ``[..., F]``: it compares before rounding."""
        gate, up, _, gate_bias, up_bias, _ = self.operands()
        weight, bias = (gate, gate_bias) if self.router == "gate" else (up, up_bias)
        y = nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
        routed = ACTIVATIONS[self.activation](y) if self.router == "gate" else y
        return keep_mask(routed, self.thresholds) & (routed != 0)

    def operands(
        self,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Gate, up and down as the operator takes them, then their biases."""
        return _operands(self.layout, *self._linears())

    def extra_repr(self) -> str:
        return f"backend={self.backend}"

    def _run_original(self, x: Tensor) -> Tensor:
        original: Any = self._original[0]
        original.training = self.training
        # its hooks are those of this module and run here
        out: Tensor = original.forward(x)
        return out

    def _named_argument(self, x: Tensor | None, named: dict[str, Tensor]) -> Tensor:
        if x is None and self._argument in named:
            x = named.pop(self._argument)
        if x is None or named:
            raise UnsupportedModelError(
                f"a fused MLP takes {self._argument} alone, this one was called with "
                f"{', '.join(named) or 'nothing'}: call cats.unfuse_(model)"
            )
        return x

    def _linears(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        modules, layout = self._modules, self.layout
        gate, up, down = modules[layout.gate], modules[layout.up], modules[layout.down]
        act: Any = modules[self.activation_name]
        inner: Any = act._modules.get("act")
        # an adapter that was added later, or another activation, would be ignored in silence
        if not (
            type(gate) is type(up) is type(down) is nn.Linear
            and type(act) is CatsActivation
            and (type(inner), getattr(inner, "approximate", None)) == self._inner
            and act.router == self.router
        ):
            raise BackendError(
                "a layer of this fused MLP was replaced after fuse_ (by an adapter, quantisation "
                "or another activation): call cats.unfuse_(model) before changing its layers"
            )
        if (
            gate._forward_hooks or gate._forward_pre_hooks
            or up._forward_hooks or up._forward_pre_hooks
            or down._forward_hooks or down._forward_pre_hooks
            or act._forward_hooks or act._forward_pre_hooks
            or inner._forward_hooks or inner._forward_pre_hooks
            or "forward" in gate.__dict__ or "forward" in up.__dict__
            or "forward" in down.__dict__ or "forward" in act.__dict__
        ) and any(map(_runs_otherwise, (gate, up, down, act, inner))):  # fmt: skip
            raise BackendError(
                "a layer of this fused MLP got a hook or another forward after fuse_, which the "
                "operator would not run: call cats.unfuse_(model) first, or hook the MLP itself"
            )
        return gate, up, down


def _runs_otherwise(module: nn.Module) -> bool:
    # weights that a hook of accelerate loads are checked apart
    return is_hooked(module) or has_other_forward(module)


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
        UnsupportedModelError: If the model is dense, or an MLP computes another formula, has layers
            other than ``nn.Linear`` with ordinary weights, or hooks on its layers. Hooks on the MLP
            itself go along.
        BackendError: If there is no such backend.

    A call that fails leaves the model as it was.
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
    if "" in names:
        raise UnsupportedModelError(
            f"{type(model).__name__} is an MLP itself, which nothing holds that could hold the "
            "fused one: put it into a module, such as nn.Sequential"
        )
    mlps = find_gated_mlps(model, names=names - fused)
    for mlp in mlps:
        check_fusable(mlp)
    pairs = [(mlp.module, FusedGatedMLP(mlp, backend)) for mlp in mlps]
    strides = {id(_down(f)): f._stride for _, f in fused_mlps(model)}
    check_memory(model, [_down(fused) for _, fused in pairs])
    with unchanged_on_error(model):
        for _, replacement in pairs:
            # a weight that two MLPs share is laid out already
            replacement._stride = strides.setdefault(id(_down(replacement)), replacement._stride)
            # each neuron's column becomes contiguous; the parameter stays the same object
            lay_out_(_down(replacement), (1, len(_down(replacement))))
            # kernels read one a neuron
            _ = replacement.thresholds
        _replace(model, {id(module): fused for module, fused in pairs})
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


def take_out_(model: nn.Module) -> list[FusedGatedMLP]:
    """Put back the MLPs that were fused, and return what stood there; no weight is moved."""
    fused = [module for _, module in fused_mlps(model)]
    for module in fused:
        # hooks and mode that came meanwhile; children are the same dictionary
        share_hooks(module, module.original)
        module.original.training = module.training
    _replace(model, {id(module): module.original for module in fused})
    return fused


def restore_layout_(fused: Iterable[FusedGatedMLP]) -> None:
    """Give the weights of MLPs that were taken out the memory layout that they had before."""
    for module in fused:
        down = module._modules[module.layout.down]
        weight = getattr(down, "weight", None)
        # not one that was replaced meanwhile, by quantisation or another size
        if type(weight) is nn.Parameter and weight.shape == module._shape:
            lay_out_(weight, module._stride)
        act = module._modules[module.activation_name]
        if isinstance(act, CatsActivation):
            act.narrow_()


def fused_mlps(model: nn.Module) -> Iterator[tuple[str, FusedGatedMLP]]:
    """Name and module of each fused MLP, in the order of the model."""
    for name, module in model.named_modules():
        if isinstance(module, FusedGatedMLP):
            yield name, module


def _replace(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Put modules in the place of others, given by their ids, wherever those stand."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in replacements:
                parent._modules[name] = replacements[id(child)]


def _down(fused: FusedGatedMLP) -> nn.Parameter:
    weight: nn.Parameter = fused._modules[fused.layout.down].weight  # type: ignore
    return weight


def _operands(
    layout: Layout, gate: nn.Linear, up: nn.Linear, down: nn.Linear
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Weights, then biases, cut out of one tensor where gate and up are stacked."""
    # not as attributes, which a module looks up in Python
    first: Any = gate._parameters
    second: Any = up._parameters
    third: Any = down._parameters
    if gate is not up:
        weights = first["weight"], second["weight"], third["weight"]
        return *weights, first["bias"], second["bias"], third["bias"]
    weights = *first["weight"].chunk(2), third["weight"]
    biases = (None, None) if first["bias"] is None else first["bias"].chunk(2)
    if not layout.gate_first:
        weights, biases = (weights[1], weights[0], weights[2]), (biases[1], biases[0])
    return *weights, *biases, third["bias"]
