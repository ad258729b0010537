"""The struct of ``runs.cuh``."""

import ctypes

from torch import Tensor

from cats.ops.cuda.arguments import Arguments, Pointer, address

__all__ = ["Deal"]

# Blocks that get fewer runs share them out by index: an answer to a ticket would come too late.
_MIN_RUNS = 4


class Deal(Arguments):
    """How the runs of a launch are dealt out to its blocks; see the source."""

    __slots__ = ()
    _fields_ = (
        ("counter", Pointer),
        ("runs", ctypes.c_int),
        ("fixed", ctypes.c_int),
        ("long_tickets", ctypes.c_int),
    )

    @classmethod
    def of(
        cls,
        runs: int,
        blocks: int,
        counter: Tensor | None,
        *,
        by_index: float = 0.75,
        halves: bool = True,
    ) -> "Deal":
        """A share by index, the rest to the block that asks first.

        Args:
            runs: All of them.
            blocks: Of the launch.
            counter: int32, zero when the launch starts; None: all by index.
            by_index: The share.
            halves: Whether the last runs are dealt out in halves, so that blocks end together.
        """
        if counter is None or runs // blocks < _MIN_RUNS:
            return cls(runs=runs, fixed=-(-runs // blocks))
        fixed = int(runs // blocks * by_index)
        left = runs - fixed * blocks
        return cls(
            counter=address(counter, 4),
            runs=runs,
            fixed=fixed,
            long_tickets=max(0, left - 2 * blocks) if halves else left,
        )
