"""Find the gated MLPs of a vLLM model, and whether one of them is nothing but a gated MLP.

vLLM stacks gate and up in one layer and multiplies them in one module. Layers are told by what
vLLM's classes hold, and the activation by what it computes; names do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cats.functional import ACTIVATIONS


@dataclass(frozen=True, kw_only=True, slots=True)
class StackedMLP:
    """A gated MLP of a vLLM model.

    Attributes:
        name: Its qualified name.
        module: The MLP.
        gate_up: Name of the child with gate above up, ``[2 F, D]``, of which each process has a
            part of both.
        act: Name of the child that computes ``act(gate) * up``.
        down: Name of the child ``[D, F]``.
        activation: A name of :data:`cats.functional.ACTIVATIONS`.
    """

    name: str
    module: nn.Module
    gate_up: str
    act: str
    down: str
    activation: str

    def child(self, name: str) -> Any:
        return self.module.get_submodule(name)

    @property
    def ranks(self) -> int:
        """The number of processes that share its neurons."""
        ranks: int = self.child(self.gate_up).tp_size
        return ranks

    @property
    def rank(self) -> int:
        """Which part of the neurons this process has."""
        rank: int = self.child(self.gate_up).tp_rank
        return rank

    @property
    def size(self) -> int:
        """F of this process."""
        return int(self.child(self.gate_up).output_sizes[0]) // self.ranks


def find_mlps(model: nn.Module) -> list[StackedMLP]:
    """All gated MLPs of a vLLM model, in its order."""
    found = (_as_mlp(name, module) for name, module in model.named_modules())
    return [mlp for mlp in found if mlp is not None]


def _as_mlp(name: str, module: nn.Module) -> StackedMLP | None:
    # Any: vLLM's layers
    children: dict[str, Any] = dict(module.named_children())
    stacked = [n for n, c in children.items() if _is_stacked(c)]
    if len(stacked) != 1:
        return None
    size = children[stacked[0]].output_sizes[0]
    downs = [n for n, c in children.items() if _is_row_parallel(c, size)]
    acts = {n: kind for n, c in children.items() if (kind := activation_kind(c)) is not None}
    if len(downs) != 1 or len(acts) != 1:
        return None
    ((act, kind),) = acts.items()
    return StackedMLP(
        name=name,
        module=module,
        gate_up=stacked[0],
        act=act,
        down=downs[0],
        activation=kind,
    )


def _is_stacked(layer: Any) -> bool:
    """Whether a layer holds two matrices of one size (``MergedColumnParallelLinear``)."""
    sizes = getattr(layer, "output_sizes", None)
    return isinstance(sizes, list) and len(sizes) == 2 and sizes[0] == sizes[1]


def _is_row_parallel(layer: Any, size: int) -> bool:
    """Whether a layer takes ``size`` inputs and shares them (``RowParallelLinear``)."""
    return hasattr(layer, "input_is_parallel") and layer.input_size == size


def activation_kind(module: nn.Module) -> str | None:
    """The activation of a module that computes ``act(x[:F]) * x[F:]``, or None."""
    is_leaf = not any(True for _ in module.children())
    if not is_leaf or any(True for _ in module.parameters()):
        return None
    function: Callable[[Tensor], Tensor] = getattr(module, "forward_native", module.forward)
    gate = torch.linspace(-8, 8, 257, device="cpu", dtype=torch.float32)
    up = gate.flip(0) + 0.5
    try:
        with torch.no_grad():
            product = function(torch.cat([gate, up])[None])
    except Exception:  # a foreign module that fails here is no such activation
        return None
    if not isinstance(product, Tensor) or product.shape != (1, 257):
        return None
    for name, act in ACTIVATIONS.items():
        if torch.allclose(product[0], act(gate) * up, atol=1e-4, rtol=1e-4):
            return name
    return None


def is_plain(mlp: StackedMLP) -> bool:
    """Whether its ``forward`` computes ``down(act(gate_up(x)))`` and nothing else.

    The layers hand on marked tensors instead of computing, so that this takes no time, and no
    weights. A factor, a norm or a clamp in between makes another tensor.
    """
    gate_up, down = mlp.child(mlp.gate_up), mlp.child(mlp.down)
    x = torch.zeros(1, gate_up.input_size)
    stacked, product = torch.zeros(1, 2 * mlp.size), torch.zeros(1, mlp.size)
    out = torch.zeros(1, down.output_size)
    handed: list[tuple[str, object]] = []

    def answer(name: str, value: Any) -> Callable[[object], Any]:
        def forward(given: object) -> Any:
            handed.append((name, given))
            return value

        return forward

    def as_layer(layer: Any, value: Tensor) -> Any:
        return (value, None) if layer.return_bias else value

    answers = {
        mlp.gate_up: answer("gate_up", as_layer(gate_up, stacked)),
        mlp.act: answer("act", product),
        mlp.down: answer("down", as_layer(down, out)),
    }
    try:
        with _answering(mlp.module, answers), torch.no_grad():
            result = mlp.module.forward(x)
    except Exception:  # a forward that asks for more than x is not this form
        return False
    expected = [("gate_up", x), ("act", stacked), ("down", product)]
    return (
        result is out
        and len(handed) == 3
        and all(
            name == other and given is value
            for (name, given), (other, value) in zip(handed, expected, strict=True)
        )
    )


@contextmanager
def _answering(module: nn.Module, answers: dict[str, Callable[[object], Any]]) -> Iterator[None]:
    """Within the block, children answer instead of computing."""
    children = {module.get_submodule(name): forward for name, forward in answers.items()}
    before = {child: vars(child).get("forward") for child in children}
    try:
        for child, forward in children.items():
            vars(child)["forward"] = forward
        yield
    finally:
        for child, own in before.items():
            vars(child).pop("forward", None)
            if own is not None:
                vars(child)["forward"] = own
