"""How many threads a command uses: no more than the processors that other programs leave free.

A decode step has about 300 parallel regions, and each waits until the system runs the last of its
threads. On a machine whose processors are busy, one thread is several times as fast as two.
"""

from __future__ import annotations

import os
from pathlib import Path

# A user or torchrun sets these to choose the number of threads.
_CHOICES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class OtherLoad:
    """How many processors other programs keep busy, since this object was made."""

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
        # both are summed over all processors, so together they are the time that has passed on all
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
    return min(count, quota(Path("/sys/fs/cgroup")))


def quota(root: Path) -> float:
    """Processors that the control group of a folder may use; infinity without a limit."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return float("inf")
    if limit in ("max", "-1"):
        return float("inf")
    return int(limit) / int(period)


def limited(threads: int, available: float, busy: float | None) -> int:
    """Threads to use, of those that torch would use: a processor that is mostly busy gets none."""
    free = available - (busy or 0.0)
    return max(1, min(threads, round(free)))


def use_threads(threads: int | None, load: OtherLoad) -> str | None:
    """Set torch's threads.

    Args:
        threads: Number of threads. None: as many as torch would use, but no more than there are
            free processors.
        load: Load of the machine since this object was made.

    Returns:
        A line for the user if the number is lower than torch's; else None.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
        return None
    if any(name in os.environ for name in _CHOICES):
        return None
    default, available, busy = torch.get_num_threads(), processors(), load.processors()
    count = limited(default, available, busy)
    if count == default:
        return None
    torch.set_num_threads(count)
    noun = "thread" if count == 1 else "threads"
    return (
        f"{count} {noun} instead of {default}: other programs keep {busy or 0.0:.1f} of "
        f"{available:g} processors busy (--threads N or OMP_NUM_THREADS=N decides otherwise)"
    )
