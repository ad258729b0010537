"""A dense model and fused sparse copies of it, by their targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from cats.apply import sparsify_
from cats.benchmarks.copies import copy_for_fusion
from cats.calibration import collect
from cats.fusion import fuse_


def models_of(
    model: nn.Module, blocks: Tensor, sparsities: Sequence[float], on_stage: Callable[[str], None]
) -> Iterator[tuple[float, nn.Module]]:
    """Each target and its model. The copies share every weight except those of ``down``.

    Args:
        model: A dense Hugging Face causal model.
        blocks: Token ids ``[N, T]``, on which thresholds are calibrated.
        sparsities: The targets; 0 is the dense model itself.
        on_stage: Called with what comes next, in words.
    """
    counts = None
    if any(sparsities):
        on_stage(f"calibrating on {blocks.numel():,} tokens")
        counts = collect(model, blocks.to(next(model.parameters()).device).split(4))
    for sparsity in sorted(sparsities):
        if sparsity == 0:
            yield sparsity, model
            continue
        assert counts is not None
        sparse = copy_for_fusion(model)
        sparsify_(sparse, counts.config(sparsity))
        fuse_(sparse)
        yield sparsity, sparse
