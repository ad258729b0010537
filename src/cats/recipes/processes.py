"""Several processes that share one piece of work, as torchrun starts them."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def join_processes() -> tuple[int, int]:
    """Join the group that torchrun prepared, if it did; rank and number of processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return rank_and_number()


def rank_and_number() -> tuple[int, int]:
    """Rank and number of the processes of the group; ``(0, 1)`` without a group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def from_first_process(number: int) -> int:
    """The first process's number, in all of them."""
    if rank_and_number()[1] == 1:
        return number
    numbers = [number]
    dist.broadcast_object_list(numbers)
    return numbers[0]
