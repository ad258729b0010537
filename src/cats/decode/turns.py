"""One generation at a time on a conversation."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cats.errors import ConfigError


class Turns:
    """Lets one generation run; other threads wait for it.

    If the same thread begins another generation first, that one takes the turn: the older
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
    """The right of one thread to run."""

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
                "this stream was ended by a later call on the same decoder: use one decoder per "
                "conversation"
            )
