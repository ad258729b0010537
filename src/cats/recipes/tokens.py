"""Numbers of tokens that a user gives, in whole blocks."""

from __future__ import annotations

from cats.errors import ConfigError


def check_tokens(tokens: int | None, block: int, option: str = "--tokens") -> None:
    """Complain about fewer tokens than one block has."""
    if tokens is not None and tokens < block:
        raise ConfigError(
            f"{option} {tokens} is less than one block of {block}: give more, or a smaller block"
        )


def tokens_or_default(
    tokens: int | None, default: int, block: int, option: str = "--tokens"
) -> int:
    """The given number of tokens, checked; without one the default, which is at least a block."""
    check_tokens(tokens, block, option)
    return max(default, block) if tokens is None else tokens
