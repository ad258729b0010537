"""What fused MLPs have in common: one operator instead of an MLP, over its own layers."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Hashable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from cats.errors import BackendError, UnsupportedModelError
from cats.functional import ACTIVATIONS, cats_activation, keep_mask
from cats.model import CatsActivation, GatedMLP, Replacement, has_other_forward, share_hooks
from cats.weights import input_threshold

# Gate, up and down of an MLP; gate is up where both are stacked.
Layers: TypeAlias = tuple[nn.Module, nn.Module, nn.Module]
# Matrices or biases of gate, up and down.
Matrices: TypeAlias = tuple[Tensor, Tensor, Tensor]
Biases: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]


class FusedMLP(Replacement):
    """A sparse MLP that runs as one operator; its children are those of the MLP that it replaces.

    A call with few tokens reads only what kept neurons need; one with many runs dense GEMMs with
    the same thresholds. It has no gradient. Under autocast the original MLP runs.

    Attributes:
        layout: Which children are gate, up and down.
        backend: ``"auto"``, or one of :data:`cats.ops.BACKENDS`.
        activation_name: Name of the child that is the activation.
        activation: The activation that the operator computes, such as ``"silu"``.
        router: The branch that is compared with the thresholds, ``"gate"`` or ``"up"``.
        intermediate_size: ``F``, the number of neurons.
    """

    def __init__(self, mlp: GatedMLP, backend: str) -> None:
        super().__init__()
        act = cast(CatsActivation, mlp.act)
        self.layout = mlp.known_layout()
        self.backend = backend
        self.activation_name = mlp.activation_name
        self.activation = mlp.operands().activation
        self.router = act.router
        self.intermediate_size = mlp.intermediate_size
        self._argument_name = next(iter(inspect.signature(mlp.module.forward).parameters), "x")
        self._has_dropout = any(isinstance(m, _DropoutNd) and m.p for m in mlp.module.children())
        self._dense_act_kind = _kind_of(act.act)
        layout, modules = self.layout, mlp.module._modules
        # a masked layer has a class of its own
        self._types = tuple(type(modules[n]) for n in (layout.gate, layout.up, layout.down))
        self._checked_call: Hashable = None
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
        return self._thresholds(cast(CatsActivation, self._modules[self.activation_name]))

    def widen_thresholds_(self) -> None:
        """Give the activation one threshold per neuron, as kernels read them."""
        _ = self.thresholds

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        if x is None or named:
            x = self._named_argument(x, named)
        layers = self._layers()
        if self._has_dropout and self.training:
            raise BackendError(
                "this fused MLP is in training mode and has dropout, which the operator does not "
                "compute: call model.eval() or cats.unfuse_(model)"
            )
        kind = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type
        if torch.is_autocast_enabled(kind):
            return self._run_original(x)
        rows = x.reshape(-1, x.shape[-1])
        act = cast(CatsActivation, self._modules[self.activation_name])
        return self._run(rows, layers, act).view(x.shape)

    def kept(self, x: Tensor) -> Tensor:
        """Neurons of which a kernel reads both rows, ``[..., F]``: it compares before rounding."""
        weight, bias = self._router_operands(self._layers())
        inputs = input_threshold(self._layers()[0 if self.router == "gate" else 1])
        x = x.float() if inputs is None else cats_activation(x.float(), inputs)
        y = nn.functional.linear(x, weight.float(), None if bias is None else bias.float())
        routed = ACTIVATIONS[self.activation](y) if self.router == "gate" else y
        return keep_mask(routed, self.thresholds) & (routed != 0)

    def extra_repr(self) -> str:
        return f"backend={self.backend}"

    @abstractmethod
    def _run(self, rows: Tensor, layers: Layers, act: CatsActivation) -> Tensor:
        """The operator on ``[B, D]``."""

    @abstractmethod
    def _router_operands(self, layers: Layers) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the branch that is compared, in numbers."""

    def _is_as_fused(self, layers: Layers) -> bool:
        """Whether the layers hold their weights as they did after ``fuse_``."""
        return True

    def _run_original(self, x: Tensor) -> Tensor:
        original = self.original
        original.training = self.training
        # not its __call__: its hooks are those of this module and run here
        output: Tensor = original.forward(x)
        return output

    def _named_argument(self, x: Tensor | None, named: dict[str, Tensor]) -> Tensor:
        if x is None and self._argument_name in named:
            x = named.pop(self._argument_name)
        if x is None or named:
            raise UnsupportedModelError(
                f"a fused MLP takes {self._argument_name} alone, this one was called with "
                f"{', '.join(named) or 'nothing'}: call cats.unfuse_(model)"
            )
        return x

    def _thresholds(self, act: CatsActivation) -> Tensor:
        # not as an attribute, which a module looks up in Python
        thresholds = act._buffers.get("threshold")
        if thresholds is None or thresholds.ndim != 1:
            return act.widen_(self.intermediate_size)
        return thresholds

    def _layers(self) -> Layers:
        """Gate, up and down; a layer that was changed after ``fuse_`` is refused.

        An adapter that was added later, or another activation, would be ignored in silence.
        """
        modules, layout = self._modules, self.layout
        # Any: a child that is gone would be None
        children: tuple[Any, ...] = (modules[layout.gate], modules[layout.up], modules[layout.down])
        gate, up, down = children
        act = modules[self.activation_name]
        if not (
            (type(gate), type(up), type(down)) == self._types
            and self._is_as_fused((gate, up, down))
            and type(act) is CatsActivation
            and (dense_act := act._modules.get("act")) is not None
            and _kind_of(dense_act) == self._dense_act_kind
            and act.router == self.router
        ):
            raise BackendError(
                "a layer of this fused MLP was replaced after fuse_ (by an adapter, quantisation "
                "or another activation): call cats.unfuse_(model) before changing its layers"
            )
        # the fields themselves: a property or a call per layer would slow down every token
        for layer in (gate, up, down, act, dense_act):
            is_hooked = layer._forward_hooks or layer._forward_pre_hooks
            has_own_forward = "forward" in layer.__dict__ and layer is not dense_act
            if is_hooked or (has_own_forward and has_other_forward(layer)):
                raise BackendError(
                    "a layer of this fused MLP got a hook or another forward after fuse_, which "
                    "the operator would not run: call cats.unfuse_(model) first, or hook the MLP "
                    "itself"
                )
        return gate, up, down

    def _halves(self, stacked: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up of a stacked tensor."""
        first, second = stacked.chunk(2)
        return (first, second) if self.layout.gate_first else (second, first)

    def _biases(self, layers: Layers) -> Biases:
        gate, up, down = layers
        if gate is not up:
            return _bias(gate), _bias(up), _bias(down)
        stacked = _bias(gate)
        return *((None, None) if stacked is None else self._halves(stacked)), _bias(down)


def _kind_of(act: nn.Module) -> tuple[type[nn.Module], str | None]:
    """The class of a dense activation, and which form of GELU it computes."""
    return type(act), getattr(act, "approximate", None)


def _bias(layer: nn.Module) -> Tensor | None:
    # a layer of quantised weights has an attribute where it has none
    return layer._parameters.get("bias")
