"""Run a module with its activation held at a constant: is it a gated MLP, and what is its gate?"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cats.model.modules import evaluating
from cats.weights import weight_of
from cats.weights.placement import has_weights, input_device

# Scales of the probe's inputs: some models clamp, and a clamp shows only far from zero.
_SCALES = (0.01, 1.0, 30.0)
_TOKENS = 4
# The answer of the probe to an MLP whose activation is multiplied with nothing.
UNGATED = "ungated"


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


@dataclass(frozen=True, slots=True)
class Found:
    """What the probe found of a gated MLP; the layout is None where it cannot tell the layers."""

    hidden_size: int
    intermediate_size: int
    layout: Layout | None


def probe(module: nn.Module, activation_name: str) -> Found | str:
    """What a gated MLP consists of, or why the module is none.

    With a zero activation the output must not depend on the input, with a one it must. With a one
    the input of down is the output of up: so the layers are told apart, whatever their names are
    and however their weights are stored.

    Args:
        module: A module of linear layers and one activation; on ``meta``, a copy is probed.
        activation_name: Name of that activation.
    """
    if any(p.ndim == 3 for p in module.parameters(recurse=False)):
        return "its experts are stacked in one tensor, which CATS does not support yet"
    if not has_weights(module):
        try:
            module = _with_random_weights(module)
        except (RuntimeError, TypeError) as error:
            return f"its weights are on meta and cannot be drawn at random ({error})"
    shapes = [weight.shape for c in module.children() if (weight := weight_of(c))]
    outputs = {rows for rows, _ in shapes}
    # D enters gate and up and leaves down; F enters down only
    candidates = [d for d, _ in Counter(i for _, i in shapes).most_common() if d in outputs]
    if not candidates:
        return "no linear layer gives back the size that another one takes"
    hidden_size = candidates[0]
    layouts, is_gated = [], False
    for x in inputs(module, hidden_size):
        try:
            zero = _run(module, activation_name, x, 0.0)
            one = _run(module, activation_name, x, 1.0)
        except Exception as error:  # a foreign module: whatever it raises is the reason
            return f"it cannot be called with hidden states alone ({type(error).__name__}: {error})"
        if zero.calls != 1:
            return f"its activation runs {zero.calls} times in a forward pass, expected once"
        if not isinstance(zero.output, Tensor) or zero.output.shape != x.shape:
            return "it does not return one tensor of the shape of its input"
        if one.gate.shape[:2] != x.shape[:2]:
            return f"its activation sees the shape {list(one.gate.shape)}, expected [B, T, F]"
        spread_of_zero, spread_of_one = map(_spread, (zero.output, one.output))
        if spread_of_zero > 1e-3 * max(spread_of_one, one.output.abs().max()):
            return "its output depends on the input even where its activation is zero"
        # a threshold on up or on products may drop all that comes of small inputs
        is_gated |= bool(spread_of_one > 1e-6 * one.output.abs().max())
        layouts.append(one.layout())
    if not is_gated:
        return UNGATED
    # the smallest inputs that tell: a clamp has no effect there
    layout = next((layout for layout in layouts if layout is not None), None)
    return Found(hidden_size, int(one.gate.shape[-1]), layout)


def inputs(module: nn.Module, hidden_size: int) -> Iterator[Tensor]:
    """Random hidden states ``[1, T, D]`` of small, unit and large scale, the same at each call."""
    dtype = next(weight.dtype for c in module.children() if (weight := weight_of(c)))
    device = input_device(module)
    for scale in _SCALES:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, _TOKENS, hidden_size, generator=generator) * scale
        yield x.to(device=device, dtype=dtype)


@dataclass(slots=True)
class _Run:
    """A forward pass with a constant activation.

    Attributes:
        output: What the module returned.
        gates: What its activation got, once for each call.
        layers: Name of each linear layer to its input and output.
    """

    output: Any = None
    gates: list[Tensor] = field(default_factory=list)
    layers: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def calls(self) -> int:
        return len(self.gates)

    @property
    def gate(self) -> Tensor:
        return self.gates[0]

    def layout(self) -> Layout | None:
        """Which layer is what, after a pass with an activation of one."""
        down = next((n for n, (_, y) in self.layers.items() if _same(y, self.output)), None)
        if down is None:
            return None
        product = self.layers[down][0]
        others = {name: y for name, (_, y) in self.layers.items() if name != down}
        gate = next((n for n, y in others.items() if _same(y, self.gate)), None)
        up = next((n for n, y in others.items() if n != gate and _kept_of(y, product)), None)
        if gate is not None and up is not None:
            return Layout(gate, up, down)
        for name, y in others.items():
            if y.shape[-1] == 2 * self.gate.shape[-1]:
                first, second = y.chunk(2, -1)
                if _same(first, self.gate) and _kept_of(second, product):
                    return Layout(name, name, down)
                if _same(second, self.gate) and _kept_of(first, product):
                    return Layout(name, name, down, gate_first=False)
        return None


def _run(module: nn.Module, activation_name: str, x: Tensor, fill: float) -> _Run:
    """A forward pass with the activation's output replaced by a constant."""
    run = _Run()

    def constant(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not args:
            raise TypeError("its activation is called with a keyword argument")
        run.gates.append(args[0])
        return torch.full_like(output, fill)

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if args:
                run.layers[name] = args[0], output

        return hook

    with ExitStack() as stack:
        stack.callback(getattr(module, activation_name).register_forward_hook(constant).remove)
        for name, child in module.named_children():
            if weight_of(child) is not None:
                stack.callback(child.register_forward_hook(note(name)).remove)
        stack.enter_context(evaluating(module))
        with torch.no_grad():
            run.output = module(x)
    return run


def _same(a: Tensor, b: Tensor) -> bool:
    a, b = (t.flatten(0, -2) for t in (a, b))
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)


def _kept_of(up: Tensor, product: Tensor) -> bool:
    """Whether it is up, or what thresholds keep of it."""
    kept = product != 0
    return up.shape == product.shape and bool(kept.any()) and _same(up.where(kept, 0), product)


def _spread(output: Tensor) -> Tensor:
    """How far the outputs of tokens lie from that of the first."""
    return (output - output[:, :1]).abs().max()


def _with_random_weights(module: nn.Module) -> nn.Module:
    twin = copy.deepcopy(module).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            if not parameter.is_floating_point():
                parameter.random_(1, 100, generator=generator)
                continue
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    return twin
