"""How well a model predicts, how many neurons it drops, and how much of each matrix it reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cats.calibration.collection import forward_hidden, without_padding
from cats.data import Batch, as_batch
from cats.errors import DataError, UnsupportedModelError
from cats.fusion import ReadShares, fused_mlps
from cats.model import CatsActivation, RoutedExperts, Routes, evaluating, watched_routes
from cats.model.routes import calling_activation, own_rows
from cats.processes import in_order, rank_and_number
from cats.protocols import CausalModel
from cats.weights.placement import check_has_weights, input_device


def perplexity(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    losses: list[float] | None = None,
    share: bool = False,
) -> float:
    """``exp`` of the mean negative log-likelihood of each token after the first of its block.

    Args:
        model: A Hugging Face causal model, dense or sparse.
        batches: Token ids ``[B, T]`` with ``T >= 2``, or mappings with ``attention_mask``; padding
            is neither predicted nor counted.
        losses: The mean negative log-likelihood of each block is added at its end.
        share: Whether the processes of a ``torch.distributed`` group share the batches, which are
            the same in all of them. Each runs its part, and all get the number of one process.

    Raises:
        DataError: If there is nothing to predict, or the likelihood is NaN.
    """
    return _perplexity(model, batches, [], losses, share)


def perplexity_and_sparsity(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    losses: list[float] | None = None,
    share: bool = False,
) -> tuple[float, dict[str, float]]:
    """:func:`perplexity` and :func:`realized_sparsity` of a sparse model, in one pass."""
    with DroppedNeurons(model) as dropped:
        value = _perplexity(model, batches, [dropped], losses, share)
    if share:
        dropped.add_processes()
    return value, dropped.shares()


def perplexity_and_shares(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    losses: list[float] | None = None,
    share: bool = False,
) -> tuple[float, dict[str, float], dict[str, float]]:
    """:func:`perplexity`, :func:`realized_sparsity` and :func:`read_shares`, in one pass."""
    with ReadShares(model) as read, DroppedNeurons(model) as dropped:
        value = _perplexity(model, batches, [read, dropped], losses, share)
    if share:
        read.add_processes()
        dropped.add_processes()
    return value, dropped.shares(), read.shares()


def read_shares(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Share of each matrix of a sparse model that a token reads, on average over some tokens.

    Args:
        model: A sparse model.
        batches: As for :func:`perplexity`.

    Returns:
        Name of each linear layer that is not read whole to its share, in ``[0, 1]``. Of stacked
        experts, the name of their module, to the share of the experts that a token is routed to.

    Raises:
        UnsupportedModelError: If the model is dense.
        DataError: If there are no tokens.
    """
    with ReadShares(model) as read, evaluating(model):
        device = input_device(model)
        for batch in batches:
            ids, read.mask = _to_device(batch, device)
            forward_hidden(model, ids, read.mask)
    return read.shares()


def realized_sparsity(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Fraction of neurons that each sparse MLP drops on the given tokens.

    A neuron counts as dropped where its thresholded activation is exactly zero. In a fused MLP,
    the kernel decides: it does not round the gate before the comparison.

    Args:
        model: A sparse model.
        batches: As for :func:`perplexity`.

    Returns:
        Name of each sparse MLP to its fraction, in ``[0, 1]``.

    Raises:
        UnsupportedModelError: If the model is dense.
        DataError: If there are no tokens.
    """
    with DroppedNeurons(model) as dropped, evaluating(model):
        device = input_device(model)
        for batch in batches:
            ids, dropped.mask = _to_device(batch, device)
            forward_hidden(model, ids, dropped.mask)
    return dropped.shares()


def _perplexity(
    model: nn.Module,
    batches: Iterable[Batch],
    counters: Sequence[DroppedNeurons | ReadShares],
    losses: list[float] | None,
    share: bool,
) -> float:
    check_has_weights(model)
    rank, processes = rank_and_number() if share else (0, 1)
    # of each batch, the summed loss of each row and the number of its tokens
    sums: list[list[tuple[float, int]]] = []
    causal_model = cast(CausalModel, model)
    device = input_device(model)
    for index, batch in enumerate(batches):
        if index % processes != rank:
            continue
        ids, mask = _to_device(batch, device)
        for counter in counters:
            counter.mask = mask
        attention = {} if mask is None else {"attention_mask": mask.long()}
        with evaluating(model), torch.no_grad():
            logits = causal_model(input_ids=ids, use_cache=False, **attention).logits
        targets = ids[:, 1:]
        if mask is not None:
            targets = targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
        # row by row: float32 copies of all logits at once would take gigabytes
        sums.append(
            [
                (
                    float(F.cross_entropy(r.float(), t, reduction="sum", ignore_index=-100)),
                    int((t != -100).sum()),
                )
                for r, t in zip(logits[:, :-1], targets, strict=True)
            ]
        )
    total, tokens = 0.0, 0
    for loss, count in chain.from_iterable(in_order(sums) if share else sums):
        total, tokens = total + loss, tokens + count
        if losses is not None and count:
            losses.append(loss / count)
    if not tokens:
        raise DataError("no tokens to predict: blocks need at least two tokens")
    if math.isnan(total):
        raise DataError("the model's likelihoods are NaN: check its weights and dtype")
    return math.exp(total / tokens)


def _to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor | None]:
    ids, mask = as_batch(batch)
    return ids.to(device), None if mask is None else mask.to(device)


class DroppedNeurons:
    """Counts dropped neurons while its hooks are on the model.

    Attributes:
        mask: ``[B, T]`` of the next batch; False is padding, which is not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        check_has_weights(model)
        self._fused = dict(fused_mlps(model))
        self._acts = {
            mlp: module
            for name, module in model.named_modules()
            if isinstance(module, CatsActivation)
            and (mlp := name.rpartition(".")[0]) not in self._fused
        }
        self._parents = dict(model.named_modules())
        if not self._acts and not self._fused:
            raise UnsupportedModelError(
                "the model is dense: apply thresholds with cats.sparsify_ first"
            )
        self.mask: Tensor | None = None
        self._dropped: dict[str, Tensor | int] = dict.fromkeys([*self._acts, *self._fused], 0)
        self._neurons = dict.fromkeys(self._dropped, 0)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for name, act in self._acts.items():
            count: Callable[..., None] = partial(self._count_outputs, name)
            experts = self._parents[name]
            if isinstance(experts, RoutedExperts):
                self._stack.enter_context(calling_activation(experts))
                routes = self._stack.enter_context(watched_routes(experts))
                count = partial(self._count_experts, name, routes)
            handle = act.register_forward_hook(count)
            self._stack.callback(handle.remove)
        for name, mlp in self._fused.items():
            handle = mlp.register_forward_pre_hook(
                lambda m, args, named, name=name: self.count(name, m.kept(*args, *named.values())),
                with_kwargs=True,
            )
            self._stack.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def shares(self) -> dict[str, float]:
        """Name of each sparse MLP to the fraction of its neurons that were dropped."""
        if not all(self._neurons.values()):
            raise DataError("no tokens to measure sparsity on")
        return {name: float(n) / self._neurons[name] for name, n in self._dropped.items()}

    def add_processes(self) -> None:
        """Add what the other processes of the ``torch.distributed`` group have counted."""
        own = {name: (int(n), self._neurons[name]) for name, n in self._dropped.items()}
        # one piece of work per process
        counts = in_order([own])
        for name in own:
            self._dropped[name] = sum(part[name][0] for part in counts)
            self._neurons[name] = sum(part[name][1] for part in counts)

    def totals(self) -> tuple[int, int]:
        """Dropped neurons of all MLPs, summed over the tokens, and all neurons in the same way."""
        return sum(map(int, self._dropped.values())), sum(self._neurons.values())

    def _count_outputs(self, name: str, _: nn.Module, args: object, output: Tensor) -> None:
        self.count(name, output != 0)

    def _count_experts(
        self, name: str, routes: Routes, _: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> None:
        if not output.numel():
            return
        kept = output[own_rows(routes, args[0], self.mask)] != 0
        self._dropped[name] = self._dropped[name] + (~kept).sum()
        self._neurons[name] += kept.numel()

    def count(self, name: str, kept: Tensor) -> None:
        """Take which neurons of an MLP a pass keeps, ``[..., F]``."""
        kept = kept if self.mask is None else without_padding(name, kept, self.mask)
        self._dropped[name] = self._dropped[name] + (~kept).sum()
        self._neurons[name] += kept.numel()
