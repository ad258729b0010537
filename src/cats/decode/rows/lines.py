"""Which tokens each line of the cache holds, and who may use it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

# Token ids [n].
Ids = np.ndarray[Any, np.dtype[np.int64]]


class Line:
    """One line of the cache: slots for one session.

    Attributes:
        index: Its place in the buffers.
        written: How many slots are not zero, at most.
        used: Whether a session has it now.
        stale: Whether the model has changed since the session began, so that no other session may
            use what the line holds.
        last_use: Grows with each use.
    """

    def __init__(self, index: int, capacity: int) -> None:
        self.index = index
        self.written = self.last_use = 0
        self.used = self.stale = False
        self._tokens = np.zeros(capacity, dtype=np.int64)
        self._count = 0

    def writes(self, stop: int) -> None:
        """Something is to be written into slots before ``stop``, even if it fails midway."""
        self.written = max(self.written, stop)

    @property
    def tokens(self) -> Ids:
        """What its first slots hold: token ``p`` in slot ``p``."""
        return self._tokens[: self._count]

    def hold(self, start: int, tokens: Ids) -> None:
        """The slots from ``start`` on hold these tokens now, and later ones nothing."""
        if not self.stale:
            self._tokens[start : start + len(tokens)] = tokens
            self._count = start + len(tokens)

    def forget(self) -> None:
        """What it holds is of no use to later sessions."""
        self._count, self.stale = 0, self.used

    def shared_with(self, prompt: Ids) -> int:
        """How many tokens of a prompt the line holds, from the first on."""
        return common_length(self.tokens, prompt)


class Lines:
    """All lines of a cache."""

    def __init__(self, count: int, capacity: int) -> None:
        self._lines = [Line(index, capacity) for index in range(count)]
        self._uses = 0

    def __iter__(self) -> Iterator[Line]:
        return iter(self._lines)

    def has_free(self) -> bool:
        return any(not line.used for line in self._lines)

    def take(self, prompt: Ids) -> Line:
        """A free line for a new session: the one whose content is missed least.

        This is one whose whole content the prompt continues, else the least recently used one.
        """
        free = [line for line in self._lines if not line.used]
        continued = [line for line in free if line.shared_with(prompt) == len(line.tokens) > 0]
        line = (
            max(continued, key=lambda line: len(line.tokens))
            if continued
            else min(free, key=lambda line: line.last_use)
        )
        line.used = True
        return line

    def give_back(self, line: Line) -> None:
        """What it holds stays until another session needs the line."""
        self._uses += 1
        line.used = line.stale = False
        line.last_use = self._uses

    def longest(self, prompt: Ids) -> tuple[Line, int]:
        """The line that holds most of a prompt, from the first token on, and how many tokens."""
        best = max(self._lines, key=lambda line: line.shared_with(prompt))
        return best, best.shared_with(prompt)

    def forget(self) -> None:
        """The model has changed."""
        for line in self._lines:
            line.forget()


def common_length(first: Ids, second: Ids) -> int:
    """How many ids two texts share from their start."""
    count = min(len(first), len(second))
    differ = first[:count] != second[:count]
    return int(differ.argmax()) if differ.any() else count
