"""How a recipe tells what it is doing: a terminal, a notebook or nobody listens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """Shows nothing. A subclass overrides what it wants to show."""

    def say(self, text: str) -> None:
        """One line that is worth keeping, such as how long the rest will take."""

    def track(self, items: Sequence[T], text: str) -> Iterable[T]:
        """The same items, which are taken one by one while ``text`` is done."""
        return items

    def count(self, text: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """Something of ``total`` steps: a context whose function is called at each."""
        return nullcontext(lambda: None)

    def stage(self) -> AbstractContextManager[Callable[[str], None]]:
        """Something that cannot be counted: a context whose function is told what begins now.

        It is timed meanwhile: what runs in the background here would change the result.
        """
        return nullcontext(lambda text: None)


def duration(seconds: float) -> str:
    """A time in words: ``"40 s"``, ``"3 min"``, ``"2.5 h"``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
