"""How many threads a command takes: no more than the processors that others leave free.

A decode step has some 300 parallel regions, and each waits until the system runs the last of its
threads. On a machine whose processors are taken, one thread is several times as fast as two.
"""

from __future__ import annotations

import os
from pathlib import Path

# What says that somebody has decided already: a user, or torchrun.
_DECIDED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class OtherLoad:
    """How many processors other programs keep busy, from when this is made."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._before = self._times()

    def processors(self) -> float | None:
        """Busy processors, without this process; None where the system does not say."""
        now = self._times()
        if self._before is None or now is None:
            return None
        busy, idle, own = (after - before for after, before in zip(now, self._before, strict=True))
        if busy + idle <= 0:
            return None
        # the counts are of all processors, so their sum is the time that went by on all
        return max(0.0, busy - own) * (os.cpu_count() or 1) / (busy + idle)

    def _times(self) -> tuple[float, float, float] | None:
        """Seconds of all processors: busy, idle, and busy for this process."""
        try:
            fields = self._stat.read_text().splitlines()[0].split()[1:]
            # user, nice, system, idle, iowait, irq, softirq, steal; guests are part of user
            ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields[:8]]
        except (OSError, ValueError, IndexError):
            return None
        idle = ticks[3] + ticks[4]
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return sum(ticks) - idle, idle, own


def processors() -> float:
    """Processors that this process may use: its affinity, and the quota of its control group."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    return min(count, _quota(Path("/sys/fs/cgroup")))


def _quota(root: Path) -> float:
    """Processors that the control group may use; infinity where there is no limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return float("inf")
    if quota in ("max", "-1"):
        return float("inf")
    return int(quota) / int(period)


def limited(wanted: int, available: float, taken: float | None) -> int:
    """Threads to use, of those that torch wants: a processor that is mostly taken gets none."""
    free = available - (taken or 0.0)
    return max(1, min(wanted, round(free)))


def use_threads(threads: int | None, load: OtherLoad) -> str | None:
    """Set torch's threads.

    Args:
        threads: What the user wants. None: what torch would take, and no more than there are
            free processors.
        load: Started a while ago: it measures how busy the machine was since then.

    Returns:
        A line for the user where the number is lower than torch's; else None.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
        return None
    if any(name in os.environ for name in _DECIDED):
        return None
    wanted, available, taken = torch.get_num_threads(), processors(), load.processors()
    count = limited(wanted, available, taken)
    if count == wanted:
        return None
    torch.set_num_threads(count)
    noun = "thread" if count == 1 else "threads"
    return (
        f"{count} {noun} instead of {wanted}: other programs keep {taken or 0.0:.1f} of "
        f"{available:g} processors busy (--threads N or OMP_NUM_THREADS=N decides otherwise)"
    )
