"""The processes of one training, as ``torchrun`` and ``accelerate launch`` describe them.

They are read from the environment, since checks need them before the processes are connected.
"""

from __future__ import annotations

import os


def rank() -> int:
    """Number of this process; 0 is the first one, which writes files."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Whether a launcher started this process."""
    return "LOCAL_RANK" in os.environ


def is_under_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")
