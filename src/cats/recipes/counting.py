"""A long calibration: shared by several processes, saved on the way, continued where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cats.calibration import Statistics, collect
from cats.calibration.collect import block_hash
from cats.errors import DataError
from cats.recipes.processes import from_first_process, rank_and_number
from cats.recipes.progress import Progress

# Batches of one process between two saves.
SAVE_EVERY = 32


def count(
    model: Any,
    blocks: Tensor,
    *,
    batch_size: int = 4,
    method: str = "cats",
    exclude: Sequence[str] = (),
    statistics: Path | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """:func:`cats.collect` part by part. All processes of a group share each part.

    Every process gets the statistics of all. They are bit for bit those of one process.

    Args:
        model: A dense model.
        blocks: Token ids ``[N, T]``, the same in every process.
        batch_size: Blocks of a forward pass.
        method: As for :func:`cats.collect`.
        exclude: As for :func:`cats.collect`.
        statistics: A file that is written after each part, and continued from if it is there. The
            first process alone reads and writes it.
        progress: Told in the first process.

    Raises:
        DataError: If the file holds counts of other blocks.
    """
    rank, processes = rank_and_number()
    show = progress if progress is not None and rank == 0 else Progress()
    counted = collect(model, [], method=method, exclude=exclude)
    if statistics is not None and statistics.exists() and rank == 0:
        counted += _load(statistics, blocks)
    left = blocks[from_first_process(counted.blocks) :]
    batches = left.split(batch_size) if len(left) else ()
    # the counts of a part are a second copy in memory: one part where nothing is saved in between
    in_parts = statistics is not None or processes > 1
    size = SAVE_EVERY * processes if in_parts else max(1, len(batches))
    parts = [batches[i : i + size] for i in range(0, len(batches), size)]
    for i, part in enumerate(parts):
        text = "calibrating" if len(parts) == 1 else f"calibrating {i + 1}/{len(parts)}"
        mine = show.track(part[rank::processes], text)
        share = collect(model, mine, method=method, exclude=exclude)
        share = share.all_reduce() if processes > 1 else share
        counted = share if not counted.tokens else counted + share
        if statistics is not None and rank == 0:
            counted.save(statistics)
    return counted


def check_text(found: Statistics, blocks: Tensor, message: str) -> None:
    """Complain with ``message`` where statistics are not those of these blocks."""
    if sum(map(block_hash, blocks)) % (1 << 64) != found.text_hash:
        raise DataError(message)


def _load(path: Path, blocks: Tensor) -> Statistics:
    found = Statistics.load(path)
    if found.blocks > len(blocks):
        raise DataError(
            f"{path}: holds {found.tokens:,} tokens, more than are asked for now: "
            "give as many with --tokens, or name another file with --statistics"
        )
    check_text(
        found,
        blocks[: found.blocks],
        f"{path}: counts of another text, seed, block length or start of a block (--bos); "
        "delete it or name another file with --statistics",
    )
    return found
