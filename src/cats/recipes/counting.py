"""A long calibration: shared by several processes, saved regularly, continued where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from cats.calibration import Statistics, collect
from cats.calibration.collection import block_hash
from cats.errors import DataError
from cats.processes import from_first_process, rank_and_number
from cats.recipes.progress import Progress

# Batches per process between two saves.
SAVE_EVERY = 32


def count(
    model: nn.Module,
    blocks: Tensor,
    *,
    batch_size: int = 4,
    method: str = "cats",
    exclude: Sequence[str] = (),
    statistics: Path | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """:func:`cats.collect` part by part; all processes of a group share each part.

    Every process gets the statistics of all blocks, bit for bit as one process would count them.

    Args:
        model: A dense model.
        blocks: Token ids ``[N, T]``, the same in every process.
        batch_size: Blocks per forward pass.
        method: As for :func:`cats.collect`.
        exclude: As for :func:`cats.collect`.
        statistics: A file that is written after each part. If it exists, counting continues from
            it. Only the first process reads and writes it.
        progress: Shows the passes of the first process.

    Raises:
        DataError: If the file holds counts of other blocks.
    """
    rank, processes = rank_and_number()
    show = progress if progress is not None and rank == 0 else Progress()
    counted = collect(model, [], method=method, exclude=exclude)
    if statistics is not None and statistics.exists() and rank == 0:
        counted += _load(statistics, blocks)
    uncounted = blocks[from_first_process(counted.blocks) :]
    batches = uncounted.split(batch_size) if len(uncounted) else ()
    # the counts of a part need as much memory again, so without a file there is one part
    in_parts = statistics is not None or processes > 1
    size = SAVE_EVERY * processes if in_parts else max(1, len(batches))
    parts = [batches[i : i + size] for i in range(0, len(batches), size)]
    for i, part in enumerate(parts):
        text = "calibrating" if len(parts) == 1 else f"calibrating {i + 1}/{len(parts)}"
        own_batches = show.track(part[rank::processes], text)
        of_part = collect(model, own_batches, method=method, exclude=exclude)
        of_part = of_part.all_reduce() if processes > 1 else of_part
        counted = of_part if not counted.tokens else counted + of_part
        if statistics is not None and rank == 0:
            counted.save(statistics)
    return counted


def check_text(statistics: Statistics, blocks: Tensor, message: str) -> None:
    """Raise DataError with ``message`` unless the statistics are those of these blocks."""
    if sum(map(block_hash, blocks)) % (1 << 64) != statistics.text_hash:
        raise DataError(message)


def _load(path: Path, blocks: Tensor) -> Statistics:
    statistics = Statistics.load(path)
    if statistics.blocks > len(blocks):
        raise DataError(
            f"{path}: holds {statistics.tokens:,} tokens, more than are asked for now: "
            "give as many with --tokens, or name another file with --statistics"
        )
    check_text(
        statistics,
        blocks[: statistics.blocks],
        f"{path}: counts of another text, seed, block length or start of a block (--bos); "
        "delete it or name another file with --statistics",
    )
    return statistics
