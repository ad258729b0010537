"""The search for the best split of a method with several masks: saved on the way, continued."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cats.calibration import Paths, Samples
from cats.calibration.collection import block_hash
from cats.config import CatsConfig
from cats.errors import ConfigError, DataError
from cats.processes import rank_and_number
from cats.recipes.progress import Progress

# Tokens that the samples come from: gradients take as long as three passes.
TOKENS = 8_192
# Batches, or layers, between two saves.
_SAVE_EVERY = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Samples of a model's layers and their paths: thresholds for every share of bytes.

    Attributes:
        model: The dense model.
        samples: Inputs of its layers.
        paths: How far each layer goes, step by step.
    """

    model: nn.Module
    samples: Samples
    paths: Paths

    def config(self, target_bytes: float) -> CatsConfig:
        """The thresholds at a share of bytes; see :meth:`cats.calibration.Paths.config`."""
        return self.paths.config(self.model, self.samples, target_bytes)


def split_masks(
    model: nn.Module,
    blocks: Tensor,
    *,
    method: str,
    attention: bool = False,
    exclude: Sequence[str] = (),
    batch_size: int = 4,
    statistics: Path | None = None,
    progress: Progress | None = None,
) -> Split:
    """Collect samples on the first blocks, :data:`TOKENS` at most, and search along all paths.

    Args:
        model: A dense model, all of it in memory.
        blocks: Token ids ``[N, T]``.
        method: Name of a method with several masks.
        attention: Whether inputs of attention's projections are dropped as well.
        exclude: Patterns of MLPs that stay dense.
        batch_size: Blocks per pass.
        statistics: A file that is written on the way. If it exists, the search continues from it;
            one file serves several methods.
        progress: Shows the passes and the layers.

    Raises:
        ConfigError: If several processes run it.
        DataError: If the file holds samples of another text.
        ModelMismatchError: If it holds those of another model or other layers.
    """
    if rank_and_number()[1] > 1:
        raise ConfigError(
            f"method {method!r} is calibrated in one process: run it without torchrun"
        )
    progress = progress or Progress()
    blocks = blocks[: max(1, TOKENS // blocks.shape[1])]
    samples = Samples.collect(model, [], exclude=exclude, attention=attention)
    stored: dict[str, dict[str, Any]] = {}
    if statistics is not None and statistics.exists():
        loaded, block = Samples.load(statistics)
        loaded.check_same(samples)
        _check_text(statistics, loaded, blocks)
        samples, stored = loaded, dict(block.get("paths", {}))
    left = blocks[samples.blocks :]
    batches = left.split(batch_size) if len(left) else ()
    if batches:
        stored = {}  # paths of fewer inputs
    for i, batch in enumerate(progress.track(batches, "inputs and gradients")):
        options: dict[str, Any] = {"exclude": exclude, "attention": attention}
        samples = Samples.collect(model, [batch], samples=samples, **options)
        if statistics is not None and (i % _SAVE_EVERY == 0 or i == len(batches) - 1):
            samples.save(statistics)
    known = Paths.from_dict(stored[method], str(statistics)) if method in stored else None
    searched = 0

    def save(paths: Paths) -> None:
        nonlocal searched
        searched += 1
        is_last = len(paths.points) == len(samples.inputs)
        if statistics is not None and (searched % _SAVE_EVERY == 0 or is_last):
            stored[method] = paths.to_dict()
            samples.save(statistics, paths=stored)

    def track(names: list[str]) -> Iterable[str]:
        return progress.track(names, f"masks of {method}")

    paths = Paths.search(
        model,
        samples,
        method,
        known=None if known is None else known.points,
        track=track,
        on_layer=save,
    )
    return Split(model=model, samples=samples, paths=paths)


def _check_text(path: Path, samples: Samples, blocks: Tensor) -> None:
    counted = blocks[: samples.blocks]
    if samples.blocks > len(blocks) or samples.text_hash != sum(map(block_hash, counted)) % 2**64:
        raise DataError(
            f"{path}: inputs of another text, seed, block length or start of a block (--bos); "
            "delete it or name another file with --statistics"
        )
