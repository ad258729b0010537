"""The progress of a long command on a terminal, and its last words when it is stopped."""

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
    """One line of a terminal; the yielded function writes it.

    It is drawn only when it changes, since the thread of a spinner or a bar would disturb what is
    measured.
    """
    from rich.live import Live
    from rich.text import Text

    with Live(console=options.err, auto_refresh=False, transient=True) as live:

        def show(text: str) -> None:
            live.update(Text(f"{text} ...", overflow="ellipsis", no_wrap=True), refresh=True)

        yield show


@contextmanager
def resumable(
    path: Path | None, has_content: Callable[[Path], bool] = Path.exists
) -> Iterator[None]:
    """Say on Ctrl+C where the same command goes on.

    Args:
        path: Folder or file of the partial results; None if the command writes none.
        has_content: Whether the path holds partial results.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        # ends the bars that these frames hold, so that the line comes after them
        traceback.clear_frames(error.__traceback__)
        if path is not None and has_content(path):
            message = f"stopped; the same command goes on from {path}"
            options.err.print(message, markup=False, highlight=False, soft_wrap=True)
        raise
