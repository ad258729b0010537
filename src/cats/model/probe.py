"""Run a module with a constant activation: is it a gated MLP, and which layer is its gate?"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cats.model.modules import evaluating
from cats.weights import QuantisedLinear, weight_of
from cats.weights.placement import has_weights, input_device

# Scales of the probe's inputs: some models clamp values, which only large inputs show.
_SCALES = (0.01, 1.0, 30.0)
_TOKENS = 4
# The answers of the probe to an MLP whose activation is multiplied with nothing, and to a gated
# one whose output has another size than its input.
UNGATED = "ungated"
PROJECTOR = "projector"
UNCALLABLE = "it cannot be called with hidden states alone"


@dataclass(frozen=True, slots=True)
class Layout:
    """Which linear layer of an MLP is which.

    Attributes:
        gate: Name of the linear layer with the rows of gate.
        up: Name of the layer with the rows of up; the same name where both are stacked.
        down: Name of the layer down.
        gate_first: Whether the rows of gate come first in a stacked layer.
    """

    gate: str
    up: str
    down: str
    gate_first: bool = True


@dataclass(frozen=True, slots=True)
class ProbedMLP:
    """Sizes and layers of a gated MLP.

    Attributes:
        hidden_size: ``D``.
        intermediate_size: ``F``, the number of neurons.
        layout: None where the probe cannot tell the layers apart.
    """

    hidden_size: int
    intermediate_size: int
    layout: Layout | None


def probe(module: nn.Module, activation_name: str) -> ProbedMLP | str:
    """Sizes and layers of a gated MLP, or the reason why the module is none.

    With a zero activation the output must not depend on the input; with an activation of one it
    must. With an activation of one, the input of down is the output of up. This tells the layers
    apart without names, and without reading the weights.

    Args:
        module: A module of linear layers and one activation; on ``meta``, a copy is probed.
        activation_name: Name of that activation.
    """
    if not has_weights(module):
        try:
            module = random_twin(module)
        except (RuntimeError, TypeError) as error:
            return f"its weights are on meta and cannot be drawn at random ({error})"
    shapes = [weight.shape for c in module.children() if (weight := weight_of(c))]
    outputs = {rows for rows, _ in shapes}
    sizes = [size for size, _ in Counter(columns for _, columns in shapes).most_common()]
    # D enters gate and up and leaves down; F enters down only
    sizes.sort(key=lambda size: size not in outputs)
    errors = []
    for hidden_size in sizes:
        try:
            return _probe(module, activation_name, hidden_size)
        except Exception as error:  # a foreign module may raise anything: that is the reason
            errors.append(f"{type(error).__name__}: {error}")
    return f"{UNCALLABLE} ({errors[0]})"


def _probe(module: nn.Module, activation_name: str, hidden_size: int) -> ProbedMLP | str:
    batches = [*inputs(module, hidden_size)]
    zeros = [_run(module, activation_name, x, 0.0) for x in batches]
    ones = [_run(module, activation_name, x, 1.0) for x in batches]
    calls = ones[0].calls
    # of several activations one after the other, the last one decides
    last = [_run(module, activation_name, x, 1.0, since=calls - 1) for x in batches * (calls > 1)]
    # a threshold on up or on products may drop everything for small inputs
    if not any(_varies(one.output) for one in last or ones):
        return UNGATED
    layouts = []
    for x, zero, one in zip(batches, zeros, ones, strict=True):
        if zero.calls != 1:
            return f"its activation runs {zero.calls} times in a forward pass, expected once"
        if not isinstance(zero.output, Tensor) or not isinstance(one.output, Tensor):
            return "it does not return one tensor"
        if one.gate.shape[:2] != x.shape[:2]:
            return f"its activation sees the shape {list(one.gate.shape)}, expected [B, T, F]"
        spread = max(_spread(one.output), one.output.abs().max())
        if _spread(zero.output) > 1e-3 * spread:
            return "its output depends on the input even where its activation is zero"
        if zero.output.shape != x.shape:
            return PROJECTOR
        layouts.append(one.layout())
    # that of the smallest inputs, on which a clamp has no effect
    layout = next((layout for layout in layouts if layout is not None), None)
    return ProbedMLP(hidden_size, int(ones[-1].gate.shape[-1]), layout)


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
        gates: The inputs of its activation, one per call.
        layers: Name of each linear layer to its input and output.
    """

    output: object = None
    gates: list[Tensor] = field(default_factory=list)
    layers: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def calls(self) -> int:
        return len(self.gates)

    @property
    def gate(self) -> Tensor:
        return self.gates[0]

    def layout(self) -> Layout | None:
        """Which layer is which, after a pass with an activation of one."""
        output = self.output
        assert isinstance(output, Tensor)
        down = next((n for n, (_, y) in self.layers.items() if _same(y, output)), None)
        if down is None:
            return None
        product = self.layers[down][0]
        others = {name: y for name, (_, y) in self.layers.items() if name != down}
        gate = next((n for n, y in others.items() if _same(y, self.gate)), None)
        up = next((n for n, y in others.items() if n != gate and _keeps(product, y)), None)
        if gate is not None and up is not None:
            return Layout(gate, up, down)
        for name, y in others.items():
            if y.shape[-1] == 2 * self.gate.shape[-1]:
                first, second = y.chunk(2, -1)
                if _same(first, self.gate) and _keeps(product, second):
                    return Layout(name, name, down)
                if _same(second, self.gate) and _keeps(product, first):
                    return Layout(name, name, down, gate_first=False)
        return None


def _run(
    module: nn.Module, activation_name: str, x: Tensor, fill: float, *, since: int = 0
) -> _Run:
    """A forward pass with the activation's output replaced by a constant, from this call on."""
    run = _Run()

    def constant(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not args:
            raise TypeError("its activation is called with a keyword argument")
        run.gates.append(args[0])
        return torch.full_like(output, fill) if run.calls > since else output

    def record_layer(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if args:
                run.layers[name] = args[0], output

        return hook

    with ExitStack() as stack:
        stack.callback(getattr(module, activation_name).register_forward_hook(constant).remove)
        for name, child in module.named_children():
            if weight_of(child) is not None:
                stack.callback(child.register_forward_hook(record_layer(name)).remove)
        stack.enter_context(evaluating(module))
        with torch.no_grad():
            run.output = module(x)
    return run


def _same(a: Tensor, b: Tensor) -> bool:
    a, b = (t.flatten(0, -2) for t in (a, b))
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)


def _keeps(product: Tensor, up: Tensor) -> bool:
    """Whether each entry of the product is that of up, or was dropped by a threshold."""
    kept = product != 0
    return up.shape == product.shape and bool(kept.any()) and _same(up.where(kept, 0), product)


def _varies(output: object) -> bool:
    """Whether an output, that of an activation of one, depends on the token."""
    if not isinstance(output, Tensor) or output.ndim < 2:
        return True
    return bool(_spread(output) > 1e-6 * output.abs().max())


def _spread(output: Tensor) -> Tensor:
    """Largest difference between the output of a token and that of the first."""
    return (output - output[:, :1]).abs().max()


def random_twin(module: nn.Module) -> nn.Module:
    """A copy of a module on ``meta`` with random weights, always the same."""
    twin = copy.deepcopy(module)
    for name, child in twin.named_children():
        # codes drawn at random would need their own rules, and what a layer is does not change
        if isinstance(child, QuantisedLinear):
            plain = nn.Linear(
                child.in_features, child.out_features, child.bias is not None, "meta", child.dtype
            )
            setattr(twin, name, plain)
    twin.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            if not parameter.is_floating_point():
                parameter.random_(1, 100, generator=generator)
                continue
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    return twin
