"""Wakes an event loop from the thread that decodes, once for many tokens."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress


class Bell:
    """Sets events of a loop from another thread.

    Waking a loop writes to a pipe. All that rings before the loop has woken up costs one write.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._rung: deque[asyncio.Event] = deque()
        self._wakes = False

    def ring(self, event: asyncio.Event) -> None:
        """Set an event soon; from any thread."""
        self._rung.append(event)
        if not self._wakes:
            self._wakes = True
            with suppress(RuntimeError):  # the loop is closed, and nobody waits
                self._loop.call_soon_threadsafe(self._set_all)

    def _set_all(self) -> None:
        # first: what rings from now on wakes the loop again
        self._wakes = False
        while self._rung:
            self._rung.popleft().set()
