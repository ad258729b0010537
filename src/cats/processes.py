"""Several processes that share one piece of work, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def join_processes() -> tuple[int, int]:
    """Join the group of torchrun, if there is one; returns rank and number of processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return rank_and_number()


def rank_and_number() -> tuple[int, int]:
    """Rank of this process and number of processes; ``(0, 1)`` without a group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def from_first_process(value: T) -> T:
    """What the first process passes, in every process."""
    if rank_and_number()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def in_order(own: Sequence[T]) -> list[T]:
    """The results of all processes in the order of one process, in every process.

    Args:
        own: Those of this process, which has every ``n``-th piece of work of ``n`` processes,
            beginning at its rank.
    """
    _, processes = rank_and_number()
    if processes == 1:
        return list(own)
    parts: list[Sequence[T]] = [()] * processes
    dist.all_gather_object(parts, own)
    return [parts[i % processes][i // processes] for i in range(sum(map(len, parts)))]
