"""Numbers of tokens that a user gives, in whole blocks."""

from __future__ import annotations

from cats.errors import ConfigError


def check_tokens(tokens: int | None, block: int, option: str = "--tokens") -> None:
    """Refuse fewer tokens than one block has.

    Raises:
        ConfigError: If there are fewer.
    """
    if tokens is not None and tokens < block:
        raise ConfigError(
            f"{option} {tokens} is less than one block of {block}: give more, or a smaller block"
        )


def tokens_or_default(
    tokens: int | None, default: int, block: int, option: str = "--tokens"
) -> int:
    """The number of tokens, checked; if it is None, the default, but at least one block."""
    check_tokens(tokens, block, option)
    return max(default, block) if tokens is None else tokens
