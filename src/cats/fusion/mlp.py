"""One sparse MLP as one call of the operator ``cats::gated_mlp``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from typing import cast

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
    has_other_forward,
    share_hooks,
)
from cats.ops import (
    GatedMLPArguments,
    call,
    checked,
    is_dense_batch,
    is_for_compiler,
    is_unwatched,
)
from cats.ops.mlp import dense


class FusedGatedMLP(Replacement):
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
        down_shape: Shape of the weight of down.
        down_stride: Its strides before ``fuse_``, which ``unfuse_`` restores.
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
        self._checked_call: Hashable = None
        self._function: Callable[[GatedMLPArguments], Tensor] = dense.gated_mlp
        self._original = [mlp.module]  # in a list, so that its weights are not registered twice
        # the same dictionary: a child that is replaced here is replaced there
        self._modules = mlp.module._modules
        self.down_shape, self.down_stride = self.down_weight.shape, self.down_weight.stride()
        self.training = mlp.module.training
        share_hooks(mlp.module, self)

    @property
    def original(self) -> nn.Module:
        """The MLP that was replaced."""
        return self._original[0]

    @property
    def down_weight(self) -> nn.Parameter:
        """``[D, F]``, as it is now."""
        down = cast(nn.Linear, self._modules[self.layout.down])
        return cast(nn.Parameter, down.weight)

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
        gate, up, down, act = self._layers()
        if self._has_dropout and self.training:
            raise BackendError(
                "this fused MLP is in training mode and has dropout, which the operator does not "
                "compute: call model.eval() or cats.unfuse_(model)"
            )
        kind = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type
        if torch.is_autocast_enabled(kind):
            return self._run_original(x)
        rows = x.reshape(-1, x.shape[-1])
        weights, biases = _weights_and_biases(self.layout, gate, up, down)
        arguments = GatedMLPArguments(
            rows,
            *weights,
            self._thresholds(act),
            self.activation,
            self.router,
            *biases,
            act._buffers["product_threshold"],
        )
        for_compiler = self.backend == "auto" and is_for_compiler() and not torch.is_grad_enabled()
        if for_compiler and is_dense_batch(rows):
            # as torch operators, which a compiler fuses with what is around them
            return dense.gated_mlp(arguments).view(x.shape)
        if is_unwatched(rows):
            return self._run_unwatched(arguments).view(x.shape)
        try:
            return call(arguments, self.backend).view(x.shape)
        except RuntimeError:
            # a C++ kernel says less about what does not fit
            checked(arguments, self.backend)
            raise

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
        gate, up, down, _ = self._layers()
        weights, biases = _weights_and_biases(self.layout, gate, up, down)
        return *weights, *biases

    def extra_repr(self) -> str:
        return f"backend={self.backend}"

    def _run_unwatched(self, arguments: GatedMLPArguments) -> Tensor:
        """The backend's function without torch's dispatcher; equal calls are checked once."""
        rows, gate, up, down, thresholds = arguments[:5]
        products = arguments.product_thresholds
        biases = arguments.gate_bias, arguments.up_bias, arguments.down_bias
        key = (
            (rows.shape, rows.dtype, rows.data_ptr() % 16),
            (gate.shape, gate.dtype, gate.data_ptr()),
            up.data_ptr(),
            (down.data_ptr(), down.stride(0)),
            thresholds.data_ptr(),
            *(t is None or (t.data_ptr(), t.shape, t.dtype) for t in (products, *biases)),
        )
        if key != self._checked_call:
            self._function = checked(arguments, self.backend)
            self._checked_call = key
        return self._function(arguments)

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

    def _layers(self) -> tuple[nn.Linear, nn.Linear, nn.Linear, CatsActivation]:
        """Gate, up, down and the activation; a layer that was changed after ``fuse_`` is refused.

        An adapter that was added later, or another activation, would be ignored in silence.
        """
        modules, layout = self._modules, self.layout
        gate, up, down = modules[layout.gate], modules[layout.up], modules[layout.down]
        act = modules[self.activation_name]
        if not (
            type(gate) is type(up) is type(down) is nn.Linear
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
        return gate, up, down, act


def _kind_of(act: nn.Module) -> tuple[type[nn.Module], str | None]:
    """The class of a dense activation, and which form of GELU it computes."""
    return type(act), getattr(act, "approximate", None)


def _weights_and_biases(
    layout: Layout, gate: nn.Linear, up: nn.Linear, down: nn.Linear
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Weights and biases of gate, up and down; stacked ones are cut into gate and up."""
    if gate is not up:
        weights = _weight(gate), _weight(up), _weight(down)
        return weights, (_bias(gate), _bias(up), _bias(down))
    first, second = _weight(gate).chunk(2)
    stacked_bias = _bias(gate)
    first_bias, second_bias = (None, None) if stacked_bias is None else stacked_bias.chunk(2)
    if not layout.gate_first:
        first, second, first_bias, second_bias = second, first, second_bias, first_bias
    return (first, second, _weight(down)), (first_bias, second_bias, _bias(down))


# not as attributes, which a module looks up in Python
def _weight(layer: nn.Linear) -> Tensor:
    weight: Tensor = layer._parameters["weight"]  # type: ignore[assignment]  # never None
    return weight


def _bias(layer: nn.Linear) -> Tensor | None:
    return layer._parameters["bias"]
