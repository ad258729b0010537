"""Run text through the dense model and count the outputs of each MLP's router."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from cats.calibration import counts as _counts
from cats.calibration.statistics import Statistics
from cats.data import Batch, as_batch
from cats.errors import DataError, UnsupportedModelError
from cats.fingerprint import of_model
from cats.methods import get_counted
from cats.model import (
    CatsActivation,
    GatedExperts,
    GatedMLP,
    Routes,
    evaluating,
    find_gated_mlps,
    watched_routes,
)
from cats.model.routes import calling_activation
from cats.weights.placement import check_has_weights, input_device

# First bin of infinity, without the sign; the bins of NaN are above it.
_INFINITY_BIN = int(_counts.count(torch.tensor([float("inf")])).argmax())


def collect(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    method: str = "cats",
    exclude: Sequence[str] = (),
    statistics: Statistics | None = None,
    per_expert: bool = False,
) -> Statistics:
    """The slow half of :func:`cats.calibrate`: one pass over the text that serves every target.

    Args:
        model: A dense model.
        batches: As for :func:`cats.calibrate`.
        method: Name of the method, which chooses the values that are counted.
        exclude: As for :func:`cats.calibrate`.
        statistics: Counts of an earlier part of the text, to be added; this object does not change.
        per_expert: Count each expert of a mixture for itself, too.

    Returns:
        Statistics. Their memory does not grow with the number of tokens.
    """
    check_dense(model)
    check_has_weights(model)
    mlps = find_gated_mlps(model, exclude=exclude)
    new = Statistics(
        method=method,
        activations={mlp.name: mlp.activation for mlp in mlps},
        sizes={mlp.name: mlp.intermediate_size for mlp in mlps},
        counts={mlp.name: torch.zeros(_counts.BINS, dtype=torch.int64) for mlp in mlps},
        fingerprints={mlp.name: mlp.fingerprint() for mlp in mlps},
        weights=of_model(model),
    )
    for mlp in mlps:
        if isinstance(mlp, GatedExperts):
            new.expert_tokens[mlp.name] = torch.zeros(mlp.experts, dtype=torch.int64)
            if per_expert:
                shape = mlp.experts, _counts.EXPERT_BINS
                new.expert_counts[mlp.name] = torch.zeros(shape, dtype=torch.int64)
    with _Counting(model, mlps, new) as counting:
        for batch in batches:
            counting.run(*as_batch(batch))
    _check_finite(new)
    return new if statistics is None else statistics + new


def check_dense(model: nn.Module) -> None:
    """Raise UnsupportedModelError for a model that has thresholds already."""
    for name, module in model.named_modules():
        if isinstance(module, CatsActivation):
            raise UnsupportedModelError(
                f"{name} is sparse already: calibrate the dense model (cats.densify_)"
            )


class _Counting:
    """Hooks on the model that add to statistics while the text runs."""

    def __init__(self, model: nn.Module, mlps: list[GatedMLP], statistics: Statistics) -> None:
        self._model, self._mlps, self._statistics = model, mlps, statistics
        self._mask: Tensor | None = None
        self._stack = ExitStack()

    def __enter__(self) -> _Counting:
        method = get_counted(self._statistics.method)
        self._stack.enter_context(evaluating(self._model))
        for mlp in self._mlps:
            self._stack.enter_context(mlp.opened())
            record: Callable[[Tensor], None] = partial(self._record, mlp.name)
            if isinstance(mlp, GatedExperts):
                self._stack.enter_context(calling_activation(mlp.module))
                routes = self._stack.enter_context(watched_routes(mlp.module))
                record = partial(self._record_experts, mlp.name, routes)
            self._stack.callback(method.observe(mlp, record).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, ids: Tensor, mask: Tensor | None) -> None:
        """One forward pass over ``ids [B, T]``; False in ``mask`` is padding."""
        ids = ids.to(input_device(self._model))
        self._mask = None if mask is None else mask.to(ids.device)
        forward_hidden(self._model, ids, self._mask)
        rows = ids if self._mask is None else [r[m] for r, m in zip(ids, self._mask, strict=True)]
        for row in rows:
            self._statistics.tokens += row.numel()
            self._statistics.blocks += 1
            self._statistics.text_hash = (self._statistics.text_hash + block_hash(row)) % (1 << 64)

    def _record(self, name: str, values: Tensor) -> None:
        if self._mask is not None:
            values = without_padding(name, values, self._mask)
        self._add(self._statistics.counts, name, _counts.count(values.detach()))

    def _record_experts(self, name: str, routes: Routes, values: Tensor) -> None:
        if not values.numel():
            return
        experts, tokens = routes.take(values)
        # an expert that runs on all tokens gets zeros for those that are not its own
        own = (values != 0).any(-1)
        if self._mask is not None:
            own &= self._mask.flatten().to(values.device)[tokens]
        values, experts = values[own].detach(), experts[own]
        statistics, number = self._statistics, len(self._statistics.expert_tokens[name])
        self._add(statistics.counts, name, _counts.count(values))
        self._add(statistics.expert_tokens, name, torch.bincount(experts, minlength=number))
        if name in statistics.expert_counts:
            by_expert = _counts.count_by_expert(values, experts, number)
            self._add(statistics.expert_counts, name, by_expert)

    @staticmethod
    def _add(counts: dict[str, Tensor], name: str, new: Tensor) -> None:
        counts[name] = counts[name].to(new.device).add_(new)


def without_padding(name: str, values: Tensor, mask: Tensor) -> Tensor:
    """Values of the tokens of a batch that are not padding.

    Args:
        name: Of the module that they belong to, for messages.
        values: ``[B, T, F]``, or ``[B * T, F]`` as mixtures of experts have them.
        mask: ``[B, T]``; False is padding.
    """
    if values.shape[:2] == mask.shape:
        return values[mask.to(values.device)]
    if values.shape[:-1].numel() == mask.numel():
        return values.flatten(0, -2)[mask.flatten().to(values.device)]
    raise UnsupportedModelError(
        f"{name} sees activations of shape {list(values.shape)} for a batch of shape "
        f"{list(mask.shape)}, so padding cannot be left out: calibrate without it"
    )


def forward_hidden(model: nn.Module, ids: Tensor, mask: Tensor | None) -> None:
    """Forward pass without the output head, whose logits would take the most memory."""
    body = cast(nn.Module, getattr(model, "base_model", model))
    with torch.no_grad():
        if mask is None:
            body(input_ids=ids, use_cache=False)
        else:
            body(input_ids=ids, attention_mask=mask.long(), use_cache=False)


def block_hash(ids: Tensor) -> int:
    """Hash of one row of tokens, below 2**64."""
    data = ids.to("cpu", torch.int64).contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def _check_finite(statistics: Statistics) -> None:
    magnitude = torch.arange(_counts.BINS) & (_counts.BINS // 2 - 1)
    for tensors in (statistics.counts, statistics.expert_tokens, statistics.expert_counts):
        tensors |= {name: tensor.cpu() for name, tensor in tensors.items()}
    for name, counts in statistics.counts.items():
        if bad := int(counts[magnitude >= _INFINITY_BIN].sum()):
            raise DataError(
                f"{name}: {bad} of {int(counts.sum())} activations are NaN or infinite; "
                "load the model in bfloat16 or float32 (float16 overflows), and check its weights"
            )
