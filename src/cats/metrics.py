"""What a model is worth and what it skips: perplexity and realised sparsity."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cats.calibration.collect import forward_hidden
from cats.data import Batch, as_batch
from cats.errors import DataError, UnsupportedModelError
from cats.fusion import fused_mlps
from cats.mlp import CatsActivation


def perplexity(model: nn.Module, batches: Iterable[Batch]) -> float:
    """``exp`` of the mean negative log-likelihood of each token after the first of its block.

    Args:
        model: A Hugging Face causal model, dense or sparse.
        batches: Token ids ``[B, T]`` with ``T >= 2``, or mappings with ``attention_mask``; padding
            is neither predicted nor counted.

    Raises:
        DataError: If there is nothing to predict, or the likelihood is NaN.
    """
    total, tokens = 0.0, 0
    language_model: Any = model
    device = next(model.parameters()).device
    for batch in batches:
        ids, mask = (None if t is None else t.to(device) for t in as_batch(batch))
        assert ids is not None
        attention = {} if mask is None else {"attention_mask": mask.long()}
        with torch.no_grad():
            logits = language_model(input_ids=ids, use_cache=False, **attention).logits
        targets = ids[:, 1:]
        if mask is not None:
            targets = targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
        # row by row: float32 copies of all logits at once would take gigabytes
        for row, target in zip(logits[:, :-1], targets, strict=True):
            total += float(F.cross_entropy(row.float(), target, reduction="sum", ignore_index=-100))
            tokens += int((target != -100).sum())
    if not tokens:
        raise DataError("no tokens to predict: blocks need at least two tokens")
    if math.isnan(total):
        raise DataError("the model's likelihoods are NaN: check its weights and dtype")
    return math.exp(total / tokens)


def realized_sparsity(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Fraction of neurons that each sparse MLP drops on the given tokens.

    A neuron counts as dropped where its thresholded activation is exactly zero. Of a fused MLP the
    kernels' decision is counted: they do not round the gate before the comparison.

    Args:
        model: A sparse model.
        batches: As for :func:`perplexity`.

    Returns:
        Name of each sparse MLP to its fraction, in ``[0, 1]``.

    Raises:
        UnsupportedModelError: If the model is dense.
        DataError: If there are no tokens.
    """
    fused = dict(fused_mlps(model))
    acts = {
        mlp: module
        for name, module in model.named_modules()
        if isinstance(module, CatsActivation) and (mlp := name.rpartition(".")[0]) not in fused
    }
    if not acts and not fused:
        raise UnsupportedModelError(
            "the model is dense: apply thresholds with cats.sparsify_ first"
        )
    dropped: dict[str, Tensor | int] = dict.fromkeys([*acts, *fused], 0)
    neurons = dict.fromkeys(dropped, 0)
    current: list[Tensor | None] = [None]

    def count(name: str, kept: Tensor) -> None:
        mask = current[0]
        kept = kept if mask is None else kept[mask.to(kept.device)]
        dropped[name] = dropped[name] + (~kept).sum()
        neurons[name] += kept.numel()

    handles = [
        act.register_forward_hook(lambda m, args, output, name=name: count(name, output != 0))
        for name, act in acts.items()
    ]
    handles += [
        mlp.register_forward_pre_hook(lambda m, args, name=name: count(name, m.kept(args[0])))
        for name, mlp in fused.items()
    ]
    try:
        device = next(model.parameters()).device
        for batch in batches:
            ids, mask = (None if t is None else t.to(device) for t in as_batch(batch))
            assert ids is not None
            current[0] = mask
            forward_hidden(model, ids, mask)
    finally:
        for handle in handles:
            handle.remove()
    if not all(neurons.values()):
        raise DataError("no tokens to measure sparsity on")
    return {name: float(dropped[name]) / neurons[name] for name in dropped}
