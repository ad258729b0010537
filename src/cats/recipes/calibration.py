"""Calibrate a model, and measure what its thresholds cost on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from cats.apply import sparsify_
from cats.config import CatsConfig, check_target
from cats.errors import ConfigError
from cats.methods import get_method
from cats.metrics import perplexity, perplexity_and_sparsity
from cats.processes import rank_and_number
from cats.recipes.counting import count
from cats.recipes.max_loss import largest_sparsity
from cats.recipes.progress import Progress

_DEFAULT_TARGET = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Thresholds, and what they cost.

    Attributes:
        config: The thresholds.
        perplexity_dense: Perplexity of the dense model on the held-out blocks.
        perplexity_sparse: Perplexity of the sparse model on the held-out blocks.
        realized_sparsity: Name of each MLP to the share of neurons that it drops there.
        held_out_tokens: Number of held-out tokens.
    """

    config: CatsConfig
    perplexity_dense: float
    perplexity_sparse: float
    realized_sparsity: dict[str, float]
    held_out_tokens: int


def calibrate(
    model: nn.Module,
    blocks: Tensor,
    held_out: Tensor,
    *,
    target_sparsity: float | None = None,
    max_loss: float | None = None,
    method: str = "cats",
    exclude: Sequence[str] = (),
    batch_size: int = 4,
    statistics: Path | None = None,
    progress: Progress | None = None,
) -> Calibration | None:
    """Find thresholds on some blocks, apply them, and compare with the dense model on others.

    All processes of a group share the calibration, see :func:`cats.recipes.count`. Only the first
    process measures, and its model is sparse afterwards. The others return None, and their models
    stay dense.

    Args:
        model: A dense model; changed in place.
        blocks: Token ids ``[N, T]`` to calibrate on, such as :func:`cats.recipes.split` gives.
        held_out: Token ids ``[N, T]`` to measure on.
        target_sparsity: Share of neurons to drop, inside (0, 1); 0.5 if neither this nor
            ``max_loss`` is given and the method has a target.
        max_loss: Instead of a target: see :func:`cats.recipes.largest_sparsity`.
        method: ``"cats"`` or ``"relu"``.
        exclude: Patterns of MLPs that stay dense.
        batch_size: Blocks per forward pass.
        statistics: A file for the counts; if it exists, the calibration continues from it.
        progress: Shows the passes over the blocks.

    Raises:
        ConfigError: If the options contradict each other, or ``max_loss`` allows no sparsity.
    """
    progress = progress or Progress()
    target = check_goal(method, target_sparsity, max_loss)
    counted = count(
        model,
        blocks,
        batch_size=batch_size,
        method=method,
        exclude=exclude,
        statistics=statistics,
        progress=progress,
    )
    if rank_and_number()[0] != 0:
        return None
    batches = held_out.split(batch_size)
    if max_loss is None:
        dense = perplexity(model, progress.track(batches, "dense perplexity"))
    else:
        largest = largest_sparsity(model, counted, batches, max_loss=max_loss, progress=progress)
        target, dense = largest.target_sparsity, largest.perplexity_dense
    config = counted.config(target)
    sparsify_(model, config)
    sparse, realized = perplexity_and_sparsity(model, progress.track(batches, "sparse perplexity"))
    return Calibration(
        config=config,
        perplexity_dense=dense,
        perplexity_sparse=sparse,
        realized_sparsity=realized,
        held_out_tokens=held_out.numel(),
    )


def check_goal(method: str, target: float | None, max_loss: float | None) -> float | None:
    """The target sparsity; None where the method has none, or ``max_loss`` decides.

    Raises:
        ConfigError: If the arguments contradict each other.
    """
    if target is not None and max_loss is not None:
        raise ConfigError("--max-loss looks for the sparsity: leave out --sparsity, or --max-loss")
    if not get_method(method).has_target:
        if target is not None or max_loss is not None:
            option = "--sparsity" if max_loss is None else "--max-loss"
            raise ConfigError(f"method {method!r} has no sparsity to choose: leave out {option}")
        return None
    if max_loss is not None:
        return None
    target = _DEFAULT_TARGET if target is None else target
    check_target(target)
    return target
