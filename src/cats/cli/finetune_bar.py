"""What ``cats finetune`` and ``cats bench finetune`` show while they run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cats.cli import options

if TYPE_CHECKING:
    from cats.history import Point


def first_process() -> bool:
    """Whether this is the process that reports, of those that a launcher started."""
    return int(os.environ.get("RANK", "0")) == 0


class StepBar:
    """A bar of steps, and a line for each evaluation above it.

    Attributes:
        name: Of the run, before its evaluations.
        moved: Whether a step or an evaluation was shown.
    """

    def __init__(self, steps: int) -> None:
        self._progress = options.bar(show=first_process())
        self._task = self._progress.add_task("fine-tuning", total=steps)
        self.name = ""
        self.moved = False

    def __enter__(self) -> StepBar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def step(self, step: int) -> None:
        """So many steps are taken."""
        self.moved = True
        self._progress.update(self._task, completed=step)

    def show(self, point: Point) -> None:
        """An evaluation was made."""
        from rich.markup import escape

        found = [f"{escape(name)} {share:.1%} right" for name, share in point.accuracy.items()]
        # answers come last; what else the point holds was shown when it was measured
        if not found:
            found = [f"{escape(name)} {loss:.4f}" for name, loss in point.losses.items()]
            found += [] if point.train_loss is None else [f"train {point.train_loss:.4f}"]
            found += [] if point.sparsity is None else [f"dropped {point.sparsity:.1%}"]
            seconds = point.seconds_per_step
            found += [] if seconds is None else [f"{seconds:.2f} s a step"]
        if found:
            step = f"{escape(self.name)} step {point.step}".strip()
            self._progress.console.print("  ".join([step, *found]), highlight=False)
        self.step(point.step)
