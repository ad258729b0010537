"""How a recipe tells what it is doing: to a terminal, to a notebook or to nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """Shows nothing. A subclass overrides what it wants to show."""

    def say(self, text: str) -> None:
        """One line that stays, such as how long the recipe will take."""

    def track(self, items: Sequence[T], text: str) -> Iterable[T]:
        """The same items; ``text`` says what is done with them."""
        return items

    def count(self, text: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """Work of ``total`` steps: a context whose function is called at each step."""
        return nullcontext(lambda: None)

    def stage(self) -> AbstractContextManager[Callable[[str], None]]:
        """Work that cannot be counted: a context whose function is told what begins now.

        The work may be timed, so nothing may run in the background meanwhile.
        """
        return nullcontext(lambda text: None)


def duration(seconds: float) -> str:
    """A time in words: ``"40 s"``, ``"3 min"``, ``"2.5 h"``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
