"""Calibrate a model, and measure what its thresholds cost on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cats.apply import sparsify_
from cats.calibration import Statistics
from cats.calibration.calibration import check_goals
from cats.config import CatsConfig
from cats.errors import ConfigError
from cats.methods import StagedMethod, get_counted, get_method
from cats.metrics import perplexity, perplexity_and_shares
from cats.model.traffic import share_of_layers, sparsity_at
from cats.processes import rank_and_number
from cats.recipes.counting import count
from cats.recipes.max_loss import largest_sparsity
from cats.recipes.progress import Progress
from cats.recipes.speed import Costs, least_percent
from cats.recipes.splitting import Split, split_masks

_DEFAULT_TARGET = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Thresholds, and what they cost.

    Attributes:
        config: The thresholds.
        perplexity_dense: Perplexity of the dense model on the held-out blocks.
        perplexity_sparse: Perplexity of the sparse model on the held-out blocks.
        realized_sparsity: Name of each MLP to the share of neurons that it drops there.
        bytes_read: Share of the bytes of the MLPs, and of other layers that have masks, which a
            token reads there.
        held_out_tokens: Number of held-out tokens.
    """

    config: CatsConfig
    perplexity_dense: float
    perplexity_sparse: float
    realized_sparsity: dict[str, float]
    bytes_read: float
    held_out_tokens: int


def calibrate(
    model: nn.Module,
    blocks: Tensor,
    held_out: Tensor,
    *,
    target_sparsity: float | None = None,
    target_bytes: float | None = None,
    max_loss: float | None = None,
    speed: float | None = None,
    costs: Path | None = None,
    method: str = "cats",
    attention: bool = False,
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
        target_sparsity: Share of neurons to drop, inside (0, 1).
        target_bytes: Instead: share of the bytes of the MLPs (and of attention's projections) that
            a token reads. If there is no target and no ``max_loss``, methods with one threshold
            per MLP have a sparsity of 0.5, and those with several masks read 0.5 of the bytes.
        max_loss: Instead of a target: see :func:`cats.recipes.largest_sparsity`.
        speed: Instead of a target: how many times as fast as the dense model a token should be, at
            least. The least is skipped that gives it by ``costs``.
        costs: A file of ``cats bench costs`` of this model on this device.
        method: A name of :data:`cats.methods.METHODS`.
        attention: Whether inputs of attention's projections are dropped as well.
        exclude: Patterns of MLPs that stay dense.
        batch_size: Blocks per forward pass.
        statistics: A file for the counts, or for inputs and paths; if it exists, the calibration
            continues from it.
        progress: Shows the passes over the blocks.

    Raises:
        ConfigError: If the options contradict each other, or ``max_loss`` allows no sparsity.
    """
    progress = progress or Progress()
    target = check_goal(method, target_sparsity, target_bytes, max_loss, speed, attention)
    known = _costs(speed, costs, model)
    options: dict[str, Any] = {
        "method": method,
        "exclude": exclude,
        "batch_size": batch_size,
        "statistics": statistics,
        "progress": progress,
    }
    if is_staged(method):
        choices = _of_split(split_masks(model, blocks, attention=attention, **options))
    else:
        choices = _of_counts(count(model, blocks, **options))
        if target_bytes is not None:
            target = sparsity_at(model, target_bytes, exclude=exclude)
    if rank_and_number()[0] != 0:
        return None
    batches = held_out.split(batch_size)
    if max_loss is None:
        dense = perplexity(model, progress.track(batches, "dense perplexity"))
        if known is not None and speed is not None:
            config = choices.at_percent(choices.percent_at(known, speed))
        else:
            config = choices.at_target(target)
    else:
        largest = largest_sparsity(
            model,
            choices.at_percent,
            batches,
            max_loss=max_loss,
            most=choices.most,
            unit=choices.unit,
            progress=progress,
        )
        config, dense = largest.config, largest.perplexity_dense
    sparsify_(model, config)
    sparse, realized, read = perplexity_and_shares(
        model, progress.track(batches, "sparse perplexity")
    )
    return Calibration(
        config=config,
        perplexity_dense=dense,
        perplexity_sparse=sparse,
        realized_sparsity=realized,
        bytes_read=share_of_layers(model, read),
        held_out_tokens=held_out.numel(),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Choices:
    """What a calibration offers: thresholds at each target, and at each percentage for a search.

    Attributes:
        at_target: Thresholds at a sparsity or a share of bytes.
        at_percent: Thresholds at a percentage that is skipped.
        dropped: Kind of mask to the mean share that it drops at a percentage.
        most: The largest percentage.
        unit: What the percentage is of, for messages.
    """

    at_target: Callable[[float | None], CatsConfig]
    at_percent: Callable[[int], CatsConfig]
    dropped: Callable[[int], Mapping[str, float]]
    most: int = 99
    unit: str = "sparsity"

    def percent_at(self, costs: Costs, speed: float) -> int:
        """The smallest percentage that gives a speed."""

        def speedup_at(percent: int) -> float:
            return costs.speedup(self.dropped(percent))

        return least_percent(speedup_at, speed=speed, most=self.most, unit=self.unit)


def _of_counts(counted: Statistics) -> _Choices:
    def at_percent(percent: int) -> CatsConfig:
        return counted.config(percent / 100)

    def dropped(percent: int) -> dict[str, float]:
        return {"rows": percent / 100}

    return _Choices(at_target=counted.config, at_percent=at_percent, dropped=dropped)


def _of_split(split: Split) -> _Choices:
    def at_target(share: float | None) -> CatsConfig:
        assert share is not None
        return split.config(share)

    def at_percent(percent: int) -> CatsConfig:
        return split.config(1 - percent / 100)

    def dropped(percent: int) -> dict[str, float]:
        return split.paths.mean_dropped(1 - percent / 100)

    most = min(99, math.floor(100 * (1 - split.paths.lowest) + 1e-9))
    return _Choices(
        at_target=at_target,
        at_percent=at_percent,
        dropped=dropped,
        most=most,
        unit="fewer bytes",
    )


def _costs(speed: float | None, path: Path | None, model: nn.Module) -> Costs | None:
    """
    Raises:
        ConfigError: If only one of speed and file is given, or the speed is none.
    """
    if (speed is None) != (path is None):
        raise ConfigError(
            "a speed follows from measured costs: give --speed and --costs FILE, which "
            "cats bench costs MODEL -o FILE writes"
        )
    if speed is None or path is None:
        return None
    if not speed > 1:
        raise ConfigError(
            f"--speed is that of the dense model times a number above 1, got {speed:g}"
        )
    return Costs.load(path, model)


def check_goal(
    method: str,
    target_sparsity: float | None = None,
    target_bytes: float | None = None,
    max_loss: float | None = None,
    speed: float | None = None,
    attention: bool = False,
) -> float | None:
    """The target, a sparsity or a share of bytes; None where the method or a limit decides.

    Raises:
        ConfigError: If the arguments contradict each other.
    """
    given = {"--sparsity": target_sparsity, "--bytes": target_bytes}
    given |= {"--max-loss": max_loss, "--speed": speed}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ConfigError(f"{' and '.join(names)} are two goals: leave out one of them")
    if is_staged(method):
        if target_sparsity is not None:
            raise ConfigError(
                f"method {method!r} has several masks, not one sparsity: give --bytes, the share "
                "of the bytes that a token reads"
            )
        target = _DEFAULT_TARGET if target_bytes is None else target_bytes
    elif not get_counted(method).has_target:
        if names:
            raise ConfigError(f"method {method!r} has no goal to choose: leave out {names[0]}")
        return None
    else:
        target = _DEFAULT_TARGET if target_sparsity is None else target_sparsity
    if max_loss is not None or speed is not None:
        return None
    sparsity = None if is_staged(method) or target_bytes is not None else target
    check_goals(method, sparsity, target if sparsity is None else None, attention)
    return target


def is_staged(method: str) -> bool:
    """Whether a method has several masks, and a share of bytes for its target."""
    return isinstance(get_method(method), StagedMethod)
