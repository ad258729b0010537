"""Where an MLP keeps its activation: in a child, in a function, or within its forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from cats.functional import ACTIVATIONS
from cats.model.modules import evaluating
from cats.model.probe import Layout, ProbedMLP, inputs, random_twin
from cats.model.swapped import Swapped, swap_, unswap_
from cats.weights import weight_of
from cats.weights.placement import has_weights

# Name of the child that an MLP gets whose activation is written into its forward pass.
INLINED = "act_fn"
_MODULES: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
}


class FunctionActivation(nn.Module):
    """An activation that the dense MLP keeps as a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class OpenedMLP(Swapped):
    """An MLP whose forward pass named its activation itself; this one calls a child instead."""

    layout: Layout

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = (*args, *kwargs.values())
        act = self._modules[INLINED]
        assert act is not None
        return _forward(self, self.layout, act, x)


def _forward(module: nn.Module, layout: Layout, act: nn.Module, x: Tensor) -> Tensor:
    # Any: a child that is gone would be None
    layers: Any = module._modules
    if layout.gate != layout.up:
        gate, up = layers[layout.gate](x), layers[layout.up](x)
    else:
        first, second = layers[layout.gate](x).chunk(2, dim=-1)
        gate, up = (first, second) if layout.gate_first else (second, first)
    return layers[layout.down](act(gate) * up)  # type: ignore[no-any-return]


def function_activations(module: nn.Module) -> dict[str, nn.Module]:
    """The functions that a module keeps under names like ``act_fn``, each as a module."""
    return {
        name: FunctionActivation(value)
        for name, value in vars(module).items()
        if "act" in name and callable(value) and not isinstance(value, type)
    }


def inlined_activation(kind: str) -> nn.Module:
    return _MODULES[kind]()


def place_(module: nn.Module, name: str, act: nn.Module, layout: Layout | None) -> None:
    """Put an activation into an MLP, where its forward pass then calls it."""
    if not hasattr(module, name):
        swap_(module, OpenedMLP, layout=layout)
    setattr(module, name, act)


def restore_(module: nn.Module, name: str, dense: nn.Module) -> None:
    """Put the activation of the dense MLP back, in the form that it had."""
    if isinstance(module, OpenedMLP):
        del module._modules[name]
        unswap_(module)
    elif isinstance(dense, FunctionActivation):
        del module._modules[name]
        setattr(module, name, dense.function)
    else:
        setattr(module, name, dense)


@contextmanager
def opened(
    module: nn.Module, name: str, act: nn.Module | None, layout: Layout | None = None
) -> Iterator[None]:
    """Within the block, the activation of the dense MLP is a child, which can be hooked.

    Args:
        module: The MLP.
        name: Of the child.
        act: The activation, if the MLP has no child for it; None if it has.
        layout: The layers of an MLP that names its activation in its forward pass.
    """
    if act is None or isinstance(getattr(module, name, None), nn.Module):
        yield
        return
    place_(module, name, act, layout)
    try:
        yield
    finally:
        restore_(module, name, act)


def has_shapes_of_gated_mlp(module: nn.Module) -> bool:
    """Whether the linear layers of a module could be gate, up and down, and no others."""
    weights = {name: weight_of(child) for name, child in module.named_children()}
    shapes = {name: weight.shape for name, weight in weights.items() if weight is not None}
    return any(_layouts(shapes, down) for down in shapes)


def probe_inlined(module: nn.Module) -> tuple[str, ProbedMLP] | None:
    """Activation, sizes and layers of an MLP that names its activation in its forward pass.

    It must have linear layers only, and compute ``down(act(gate(x)) * up(x))`` bit for bit.
    """
    layers = {name: weight_of(child) for name, child in module.named_children()}
    shapes = {name: weight.shape for name, weight in layers.items() if weight is not None}
    if len(shapes) != len(layers) or len(layers) not in (2, 3):
        return None
    if any(True for _ in module.parameters(recurse=False)):
        return None
    found = [layouts for down in shapes if (layouts := _layouts(shapes, down))]
    if not found:
        return None
    if not has_weights(module):
        module = random_twin(module)
    for possible in found:
        hidden_size, intermediate_size = shapes[possible[0].down]
        for layout in possible:
            for kind in ACTIVATIONS:
                if _computes(module, layout, kind, hidden_size):
                    return kind, ProbedMLP(hidden_size, intermediate_size, layout)
    return None


def _layouts(shapes: dict[str, tuple[int, int]], down: str) -> list[Layout]:
    """Which layers may be gate and up, if one of them is down."""
    hidden_size, intermediate_size = shapes[down]
    others = [name for name in shapes if name != down]
    if len(others) == 1 and shapes[others[0]] == (2 * intermediate_size, hidden_size):
        return [Layout(others[0], others[0], down, gate_first=first) for first in (True, False)]
    if len(others) == 2 and all(
        shapes[name] == (intermediate_size, hidden_size) for name in others
    ):
        return [Layout(gate, up, down) for gate, up in permutations(others)]
    return []


def _computes(module: nn.Module, layout: Layout, kind: str, hidden_size: int) -> bool:
    forward, act = type(module).forward, _MODULES[kind]()
    try:
        with evaluating(module), torch.no_grad():
            for x in inputs(module, hidden_size):
                expected = forward(module, x)
                with_child = _forward(module, layout, act, x)
                if not (isinstance(expected, Tensor) and torch.equal(expected, with_child)):
                    return False
    except Exception:  # a foreign module that cannot be called so is no MLP
        return False
    return True
