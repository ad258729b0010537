"""Cuts text that comes in pieces where a stop string begins."""

from __future__ import annotations

from collections.abc import Sequence


class StopCutter:
    """Gives out text up to the first stop string, which is left out as in OpenAI's API.

    What may be the beginning of a stop string is held back until more text shows what it is.

    Attributes:
        stopped: Whether a stop string has come.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._longest = max(map(len, strings), default=0)
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """Take the next text; returns what is certain now, which may be empty."""
        if self.stopped:
            return ""
        if not self._strings:
            return text
        text = self._held + text
        places = [place for string in self._strings if (place := text.find(string)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        certain = len(text) - self._length_of_beginning(text)
        self._held = text[certain:]
        return text[:certain]

    def end(self) -> str:
        """The text that was held back: no stop string came of it."""
        text, self._held = self._held, ""
        return text

    def _length_of_beginning(self, text: str) -> int:
        """Length of the longest end of a text with which some stop string begins."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(string.startswith(end) for string in self._strings):
                return length
        return 0
