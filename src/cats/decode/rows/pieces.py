"""How many tokens of a prompt run between two steps, so that no row waits longer than a bound."""

from __future__ import annotations

LARGEST = 2048
_SMALLEST = 8
# Where nobody waits for a next token, larger pieces take less time per token. They still end
# soon, since new sessions and cancelled ones wait for them.
_ALONE = 20
# Share of the bound that is planned for: later tokens see more earlier ones, and take longer.
_PLANNED = 0.8
_GROWTH = 2


class PieceSizes:
    """Adapts the size of pieces to the time that they take.

    Attributes:
        size: Tokens to run next.
    """

    def __init__(self, longest_wait: float) -> None:
        """
        Args:
            longest_wait: Seconds that a piece may take.
        """
        self.size = _SMALLEST
        self._longest_wait = longest_wait

    @property
    def alone(self) -> int:
        """Tokens to run next where nothing else runs."""
        return min(_ALONE * self.size, LARGEST)

    def within(self, share: float) -> int:
        """Tokens to run next in what is left of the bound."""
        return max(int(self.size * share), _SMALLEST)

    def took(self, tokens: int, seconds: float) -> None:
        """Learn from a piece that has run.

        A piece that was shorter than planned, since the prompt ended, can only make the next one
        smaller: it says little about long ones.
        """
        fitting = int(tokens * _PLANNED * self._longest_wait / max(seconds, 1e-9))
        if tokens >= self.size or fitting < min(tokens, self.size):
            self.size = max(min(fitting, _GROWTH * max(tokens, self.size), LARGEST), _SMALLEST)
