"""What a long command shows while it runs, and what it says when it is stopped."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from cats.cli import options
from cats.recipes.progress import Progress, T


class Terminal(Progress):
    """Bars and lines on standard error."""

    def say(self, text: str) -> None:
        options.err.print(text, markup=False, highlight=False)

    def track(self, items: Sequence[T], text: str) -> Iterable[T]:
        return options.progress(items, text)

    def count(self, text: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        return options.counter(text, total)

    def stage(self) -> AbstractContextManager[Callable[[str], None]]:
        return stage()


@contextmanager
def stage() -> Iterator[Callable[[str], None]]:
    """A line of a terminal that says what is going on; the yielded function writes it.

    It is drawn when it changes and never in between: the thread of a spinner or of a bar would
    take its time from what is measured.
    """
    from rich.live import Live
    from rich.text import Text

    with Live(console=options.err, auto_refresh=False, transient=True) as live:

        def show(text: str) -> None:
            live.update(Text(f"{text} ...", overflow="ellipsis", no_wrap=True), refresh=True)

        yield show


@contextmanager
def resumable(folder: Path | None, kept: Callable[[Path], bool] = Path.exists) -> Iterator[None]:
    """Say on Ctrl+C where the same command goes on.

    Args:
        folder: What is kept on the way: a folder or a file. None where nothing is.
        kept: Whether there is something in it yet.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        # ends the bars that these frames hold: the line comes after them
        traceback.clear_frames(error.__traceback__)
        if folder is not None and kept(folder):
            message = f"stopped; the same command goes on from {folder}"
            options.err.print(message, markup=False, highlight=False, soft_wrap=True)
        raise
