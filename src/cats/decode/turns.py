"""One generation at a time on a conversation."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cats.errors import ConfigError


class Turns:
    """Lets one generation run; other threads wait for it.

    A thread that begins another one before its iterator has ended takes the turn away: the old
    iterator raises at its next token.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._holder: Turn | None = None

    @contextmanager
    def take(self) -> Iterator[Turn]:
        turn = Turn(self)
        with self._free:
            while self._holder is not None and self._holder.thread != turn.thread:
                self._free.wait()
            self._holder = turn
        try:
            yield turn
        finally:
            with self._free:
                if self._holder is turn:
                    self._holder = None
                    self._free.notify()

    def held_by(self, turn: Turn) -> bool:
        return self._holder is turn


class Turn:
    """The right to run, of one thread."""

    def __init__(self, turns: Turns) -> None:
        self.thread = threading.get_ident()
        self._turns = turns

    def is_valid(self) -> bool:
        """Whether no later generation has taken the turn."""
        return self._turns.held_by(self)

    def check(self) -> None:
        """
        Raises:
            ConfigError: If a later generation has taken the turn.
        """
        if not self.is_valid():
            raise ConfigError(
                "this stream was ended by a later call on the same decoder: use one decoder a "
                "conversation"
            )
