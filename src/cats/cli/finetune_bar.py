"""The progress bar of ``cats finetune`` and ``cats bench finetune``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cats.cli import options

if TYPE_CHECKING:
    from cats.history import Point


def first_process() -> bool:
    """Whether this is the one process that prints, where a launcher started several."""
    return int(os.environ.get("RANK", "0")) == 0


class StepBar:
    """A bar of steps, and above it a line for each evaluation.

    Attributes:
        name: Name of the run, which begins each line.
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
        """Show that this number of steps is done."""
        self.moved = True
        self._progress.update(self._task, completed=step)

    def show(self, point: Point) -> None:
        """Show an evaluation."""
        from rich.markup import escape

        parts = [f"{escape(name)} {share:.1%} right" for name, share in point.accuracy.items()]
        # answers are counted last: the other numbers of that point were shown before
        if not parts:
            parts = [f"{escape(name)} {loss:.4f}" for name, loss in point.losses.items()]
            parts += [] if point.train_loss is None else [f"train {point.train_loss:.4f}"]
            parts += [] if point.sparsity is None else [f"dropped {point.sparsity:.1%}"]
            seconds = point.seconds_per_step
            parts += [] if seconds is None else [f"{seconds:.2f} s per step"]
        if parts:
            step = f"{escape(self.name)} step {point.step}".strip()
            self._progress.console.print("  ".join([step, *parts]), highlight=False)
        self.step(point.step)
