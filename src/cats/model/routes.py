"""Which expert and token each row belongs to that the activation of stacked experts sees."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cats.errors import UnsupportedModelError
from cats.model.swapped import Swapped, swap_

# The implementations of transformers that call the activation of the experts.
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
# Ours, which compares with the thresholds itself (cats.integrations.experts).
OPERATOR = "cats"


class Routes:
    """Gives the rows of an activation their experts, call by call; each thread has its own calls.

    Stacked experts get the tokens and, for each, the numbers of its experts. Which rows their
    activation then sees depends on the implementation: those of one expert after the other
    (``eager``), all in the order of tokens (``batched_mm``), or all in that of experts
    (``grouped_mm``).
    """

    def __init__(self) -> None:
        self._calls: dict[int, Iterator[tuple[Tensor, Tensor]]] = {}

    def begin(self, experts: nn.Module, *arguments: Any) -> None:
        """Expect the rows of these arguments of the experts, in this thread."""
        self._calls[threading.get_ident()] = _rows(experts, *arguments[:2])

    def end(self) -> None:
        self._calls.pop(threading.get_ident(), None)

    def take(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Expert and token of each row of the next values, of shape ``values.shape[:-1]``.

        Raises:
            UnsupportedModelError: If the rows are not those that were expected.
        """
        calls = self._calls.get(threading.get_ident())
        rows = None if calls is None else next(calls, None)
        if rows is None or rows[0].shape != values.shape[:-1]:
            expected = "none" if rows is None else list(rows[0].shape)
            raise UnsupportedModelError(
                f"an activation of experts got rows of shape {list(values.shape[:-1])}, expected "
                f"{expected}: this implementation of the experts runs them in another order; use "
                "model.set_experts_implementation('grouped_mm'), or one threshold for all experts"
            )
        return rows


class RoutedExperts(Swapped):
    """Stacked experts that watch over the routes of their sparse activation."""

    activation_name: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        act: Any = self._modules[self.activation_name]
        # only a sparse activation has this attribute, and only one per expert has routes
        if not hasattr(act, "routes"):
            return super().forward(*args, **kwargs)
        name = check_implementation(self)
        if act.routes is None or name == OPERATOR:
            return super().forward(*args, **kwargs)
        act.routes.begin(self, *args, *kwargs.values())
        try:
            return super().forward(*args, **kwargs)
        finally:
            act.routes.end()


@contextmanager
def watched_routes(experts: nn.Module) -> Iterator[Routes]:
    """Within the block, the routes of each forward pass of stacked experts, dense or sparse."""
    routes = Routes()

    def begin(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        routes.begin(module, *args, *named.values())

    handle = experts.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        yield routes
    finally:
        routes.end()
        handle.remove()


def route_(experts: nn.Module, activation_name: str) -> None:
    """Let stacked experts give their activation the routes, in place; ``unswap_`` undoes it."""
    swap_(experts, RoutedExperts, activation_name=activation_name)


def implementation(experts: nn.Module) -> str:
    """Name of the implementation that runs the experts, as transformers chooses it."""
    # the decorator of transformers marks the classes for which one can choose
    if not hasattr(experts, "is_concatenated"):
        return "eager"
    return getattr(getattr(experts, "config", None), "_experts_implementation", None) or "eager"


def check_implementation(experts: nn.Module) -> str:
    """The name of the implementation of sparse experts.

    Raises:
        UnsupportedModelError: If the implementation of the experts ignores their activation.
    """
    name = implementation(experts)
    if name not in (*IMPLEMENTATIONS, OPERATOR):
        raise UnsupportedModelError(
            f"{type(experts).__name__} runs with the experts implementation {name!r}, which may "
            "ignore its activation and so its thresholds: call "
            "model.set_experts_implementation('grouped_mm')"
        )
    return name


@contextmanager
def calling_activation(experts: Any) -> Iterator[None]:
    """Within the block, experts call their activation, also where ours would not."""
    if implementation(experts) != OPERATOR:
        yield
        return
    config = experts.config
    config._experts_implementation = "eager"
    try:
        yield
    finally:
        config._experts_implementation = OPERATOR


def own_rows(routes: Routes, gates: Tensor, mask: Tensor | None) -> Tensor:
    """Which rows of an activation of experts are those of tokens that are routed to the expert.

    Args:
        routes: Of the forward pass that runs.
        gates: The activation's next input, which has rows.
        mask: ``[B, T]``; False is padding, whose rows are left out.
    """
    tokens = routes.take(gates)[1]
    # an expert that runs on all tokens gets zeros for those that are not its own
    own: Tensor = (gates != 0).any(-1)
    return own if mask is None else own & mask.flatten().to(gates.device)[tokens]


def expert_count(experts: nn.Module) -> int:
    """How many experts have weights: the fewest that a stacked parameter holds."""
    return min(len(p) for p in experts.parameters() if p.ndim == 3)


def _rows(
    experts: nn.Module, hidden: Tensor, index: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Expert and token of each row, for each call of the activation that has rows."""
    count = expert_count(experts)
    if index is None or index.is_floating_point():
        # all experts run on all tokens, as shared experts do; those of Llama 4 get copies
        rows = hidden.shape[:-1].numel() // (count if index is None else 1)
        tokens = torch.arange(rows, device=hidden.device)
        numbers = torch.arange(count, device=hidden.device)
        return iter([tuple(torch.broadcast_tensors(numbers[:, None], tokens))])
    name = implementation(experts)
    flat = index.reshape(-1)
    if name == "eager":
        return _rows_by_expert(index, count)
    tokens = torch.arange(flat.numel(), device=index.device) // index.shape[-1]
    if name == "grouped_mm":
        flat, order = torch.sort(flat)
        tokens = tokens[order]
    # a number beyond the last expert stands for one on another device
    return iter([(flat.clamp(max=count - 1), tokens)])


def _rows_by_expert(index: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for expert in index.unique().tolist():
        if expert < count:
            # by place of the choice, then by token
            rows = torch.where(index.t() == expert)[1]
            yield torch.full_like(rows, expert), rows
