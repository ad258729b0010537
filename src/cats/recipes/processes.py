"""Several processes that share one piece of work, as torchrun starts them."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


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


def from_first_process(number: int) -> int:
    """The number that the first process passes, in every process."""
    if rank_and_number()[1] == 1:
        return number
    numbers = [number]
    dist.broadcast_object_list(numbers)
    return numbers[0]
