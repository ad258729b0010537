"""Stacked experts: the gated MLPs of a mixture, whose weights are 3-D parameters of one module."""

from __future__ import annotations

import inspect
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cats.errors import UnsupportedModelError
from cats.model.activation import CatsActivation
from cats.model.mlp import GatedMLP
from cats.model.modules import evaluating
from cats.model.probe import UNGATED, Layout, random_twin
from cats.model.routes import (
    IMPLEMENTATIONS,
    OPERATOR,
    Routes,
    calling_activation,
    expert_count,
    implementation,
    route_,
)
from cats.model.slot import place_
from cats.weights import nbytes
from cats.weights.base import entries
from cats.weights.placement import has_weights, input_device, materialized

_TOKENS = 3
# Largest relative difference between one row's gate in two products of other sizes.
_TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class GatedExperts(GatedMLP):
    """The experts of one layer, of the same form as a :class:`GatedMLP`.

    Their matrices are parameters of the module itself. A threshold is one number for all of them,
    or ``[E, 1]``, one per expert.

    Attributes:
        experts: ``E``.
    """

    experts: int = 0

    @property
    def bytes(self) -> int:
        return sum(map(nbytes, self._stacks))

    def bytes_read(self, dropped: float) -> float:
        # of three equal matrices, the router is read whole
        return self.bytes * (1 - dropped * 2 / 3)

    def fingerprint(self) -> Tensor:
        with materialized(self.module):
            sums = [entries(self.name, stack) for stack in self._stacks]
        return torch.stack(sums).sum(0)

    def known_layout(self) -> Layout:
        raise UnsupportedModelError(
            f"{self.name}: stacked experts have no linear layers, which kernels and thresholds on "
            f"inputs need: use another method, such as cats, or leave them out with "
            f"exclude=[{self.name!r}]"
        )

    def replace_act(self, act: nn.Module) -> None:
        place_(self.module, self.activation_name, act, self.layout)
        if isinstance(act, CatsActivation):
            route_(self.module, self.activation_name)

    @property
    def size(self) -> str:
        return f"{self.experts} experts, which take one number or [{self.experts}, 1]"

    def fits(self, threshold: Tensor) -> bool:
        return threshold.numel() == 1 or threshold.shape == (self.experts, 1)

    @property
    def _stacks(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters(recurse=False) if p.ndim == 3]


def are_stacked_experts(module: nn.Module) -> bool:
    """Whether a module holds matrices of experts in 3-D parameters, and no other weights."""
    own = [*module.parameters(recurse=False)]
    stacks = [p for p in own if p.ndim == 3 and p.shape[1] > 1 and p.shape[2] > 1]
    return (
        len(stacks) >= 2
        and 1 <= _arity(module) <= 3
        and not any(True for c in module.children() for _ in c.parameters())
    )


def _arity(module: nn.Module) -> int:
    return len(inspect.signature(module.forward).parameters)


def probe_experts(module: nn.Module, activation_name: str) -> tuple[int, int, int] | str:
    """Sizes D and F and the number of stacked experts, or the reason why they are none.

    With a zero activation, the output must not depend on the tokens; with an activation of one, it
    must. Each pair of token and expert must pass the activation once, in the order that
    :class:`Routes` expects: its gate is compared with that of the token and the expert alone.

    Args:
        module: Experts that are called with tokens, numbers of experts and their shares; with
            tokens and the shares of all experts; or with the tokens of all experts.
        activation_name: Name of their activation.
    """
    if (name := implementation(module)) not in (*IMPLEMENTATIONS, OPERATOR):
        return (
            f"its experts implementation {name!r} may ignore the activation: "
            "call model.set_experts_implementation('grouped_mm')"
        )
    if not has_weights(module):
        module = random_twin(module)
    sizes = Counter(n for p in module.parameters() if p.ndim == 3 for n in p.shape[1:])
    errors = []
    with calling_activation(module):
        for hidden_size, _ in sizes.most_common():
            try:
                return _probe(_Experts(module, activation_name, hidden_size))
            except Exception as error:  # a foreign module may raise anything: that is the reason
                errors.append(f"{type(error).__name__}: {error}")
    return f"it cannot be called with tokens and numbers of experts ({errors[0]})"


@dataclass(slots=True)
class _Experts:
    """Experts that can be run with a constant activation."""

    module: nn.Module
    activation_name: str
    hidden_size: int

    @property
    def routed(self) -> bool:
        return _arity(self.module) == 3

    @property
    def copies(self) -> int:
        """How often each token stands in the input."""
        return self.experts if _arity(self.module) == 1 else 1

    @property
    def experts(self) -> int:
        return expert_count(self.module)

    def tokens(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        stack = next(p for p in self.module.parameters() if p.ndim == 3)
        x = torch.randn(count, self.hidden_size, generator=generator)
        return x.to(input_device(self.module), stack.dtype)

    def run(
        self, x: Tensor, index: Tensor | None, fill: float | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Output, and the inputs of each call of the activation."""
        gates: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            gates.append(args[0])
            return None if fill is None else torch.full_like(output, fill)

        arguments: list[Tensor] = [x]
        if index is not None:
            arguments.append(index.to(x.device))
        if _arity(self.module) > 1:
            columns = self.experts if index is None else index.shape[1]
            # shares that differ: experts that were confused would show
            shares = torch.arange(1, columns + 1, device=x.device, dtype=x.dtype) / 4
            arguments.append(shares.repeat(len(x), 1))
        with ExitStack() as stack:
            act = getattr(self.module, self.activation_name)
            stack.callback(act.register_forward_hook(hook).remove)
            stack.enter_context(evaluating(self.module))
            with torch.no_grad():
                output: Tensor = self.module(*arguments)
        return output, [gate for gate in gates if gate.numel()]


def _probe(experts: _Experts) -> tuple[int, int, int] | str:
    count = experts.experts
    chosen = min(2, count)
    same = torch.arange(chosen).expand(_TOKENS, chosen) if experts.routed else None
    x = experts.tokens(_TOKENS * experts.copies)
    zero, zero_gates = experts.run(x, same, 0.0)
    one, _ = experts.run(x, same, 1.0)
    if not zero_gates:
        return "its forward pass does not call its activation"
    if zero.shape != x.shape:
        return "it does not return one tensor of the shape of its input"
    scale = torch.maximum(one.abs().max(), _spread(one, experts.copies))
    if _spread(zero, experts.copies) > 1e-3 * scale:
        return "its output depends on the input even where its activation is zero"
    if _spread(one, experts.copies) <= 1e-6 * scale:
        return UNGATED
    if reason := _misroutes(experts, x, chosen):
        return reason
    return experts.hidden_size, int(zero_gates[0].shape[-1]), count


def _spread(output: Tensor, copies: int) -> Tensor:
    """Largest difference between the outputs of tokens with the same experts."""
    rows: Tensor = output.unflatten(0, (copies, -1))
    return (rows - rows[:, :1]).abs().max()


def _misroutes(experts: _Experts, x: Tensor, chosen: int) -> str | None:
    """Why the rows of the activation are not those that are expected; None where they are."""
    module, count = experts.module, experts.experts
    reason = "its activation sees other rows than one per token and expert"
    if not experts.routed:
        # where the first token alone is not zero, only its gates are not
        first = x.clone().unflatten(0, (experts.copies, -1))
        first[:, 1:] = 0
        _, gates = experts.run(x, None)
        _, first_gates = experts.run(first.flatten(0, 1), None)
        if [gate.shape[:-1] for gate in gates] != [(count, _TOKENS)]:
            return reason
        expected = gates[0].clone()
        expected[:, 1:] = 0
        return None if _alike(first_gates[0], expected) else reason
    index = torch.stack([(torch.arange(chosen) + token) % count for token in range(_TOKENS)])
    _, gates = experts.run(x, index)
    routes = Routes()
    routes.begin(module, x, index.to(x.device))
    alone_gates: dict[tuple[int, int], Tensor] = {}
    for token, numbers in enumerate(index.tolist()):
        for number in numbers:
            # the same expert in each place: some classes need as many as the model chooses
            _, alone = experts.run(x[token : token + 1], torch.full((1, chosen), number))
            alone_gates[token, number] = alone[0][0]
    seen = set()
    for gate in gates:
        numbers, tokens = routes.take(gate)
        for row, number, token in zip(gate, numbers.tolist(), tokens.tolist(), strict=True):
            reference = alone_gates.get((token, number))
            if reference is None or not _alike(row, reference):
                return reason
            seen.add((token, number))
    routes.end()
    return None if seen == alone_gates.keys() else reason


def _alike(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).float().norm() <= _TOLERANCE * b.float().norm())
