"""Text of tokens that come one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

# Tokens that are decoded again for each new one: enough for any character and what is around it.
_CONTEXT = 16
# Characters held back where spaces are cleaned up: more than any rule looks at.
_REACH = 16
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# Kinds of tokens beside the 256 bytes.
_PLAIN, _DROPPED = 256, 257


class Detokenizer:
    """Makes text of tokens as they come, and gives out only what later tokens cannot change.

    What :meth:`add` and :meth:`end` return joins to ``tokenizer.decode`` of all tokens. Held back
    are bytes that are no whole character yet; runs of byte tokens such as ``<0xF0>``, since one
    wrong byte changes the text of the whole run; and a few characters where the tokenizer cleans
    up spaces. The time is linear in the number of tokens.
    """

    def __init__(
        self, tokenizer: Any, *, prompt: Sequence[int] = (), skip_special_tokens: bool = False
    ) -> None:
        """
        Args:
            tokenizer: One of transformers.
            prompt: Tokens that stand before. With them, the text is what the new tokens add to
                theirs: a space at its start is kept, which many tokenizers drop otherwise.
            skip_special_tokens: As in ``tokenizer.decode``.
        """
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._kinds: dict[int, int] = {}
        self._special = _special_ids(tokenizer) if skip_special_tokens else frozenset()
        self._options: dict[str, Any] = {"skip_special_tokens": skip_special_tokens}
        self._cleaner: _Cleaner | None = None
        if getattr(tokenizer, "clean_up_tokenization_spaces", False):
            self._options["clean_up_tokenization_spaces"] = False
            if _cleans_up(tokenizer):
                self._cleaner = _Cleaner(tokenizer.clean_up_tokenization)
        self._window: list[int] = []  # the last tokens; those before no longer matter
        self._given = 0  # characters of the window's text that were given out
        self._held = ""  # the others, without the run
        self._run = bytearray()  # byte tokens at the end of the window
        self._begin(prompt)

    def add(self, tokens: Iterable[int]) -> str:
        """Take tokens of one row; returns the text that is now certain, which may be empty."""
        piece = "".join(map(self._add, tokens))
        return piece if self._cleaner is None else self._cleaner.add(piece)

    @property
    def pending(self) -> str:
        """The text that is held back, as it would be if no token followed."""
        text = self._held + _text_of_run(self._run)
        if len(self._run) == len(self._window) and self._run.startswith(b" "):
            # a first space, which the tokenizer may drop
            text = self._decode(self._window)
        return text if self._cleaner is None else self._cleaner.preview(text)

    def end(self) -> str:
        """The text that was held back."""
        text = self._decode(self._window)[self._given :]
        self._given += len(text)
        self._held = ""
        self._run.clear()
        return text if self._cleaner is None else self._cleaner.end(text)

    def _begin(self, prompt: Sequence[int]) -> None:
        for token in reversed(prompt):
            if self._kind(token) != _DROPPED:
                self._window.insert(0, token)
            if len(self._window) == _CONTEXT:
                break
        before = list(self._window)
        while before and self._kind(before[-1]) < _PLAIN:
            self._run.insert(0, self._kind(before.pop()))
        text = self._decode(before) if before else ""
        self._given = len(text) - text.endswith("\ufffd")
        self._held = text[self._given :]
        if self._run:
            # the first bytes of a character that the new tokens complete are part of the new text
            whole, self._run = _split_run(self._run)
            self._given = len(text) + len(whole)
            self._held = ""

    def _add(self, token: int) -> str:
        kind = self._kind(token)
        if kind == _DROPPED:
            return ""
        self._window.append(token)
        if kind < _PLAIN:
            self._run.append(kind)
            return ""
        self._run.clear()
        text = self._decode(self._window)
        # the last character may lack bytes; those before it are whole, or will never be
        certain = len(text) - text.endswith("\ufffd")
        piece = text[self._given : certain]
        self._given = max(self._given, certain)
        self._held = text[self._given :]
        if len(self._window) >= 2 * _CONTEXT:
            self._shorten()
        return piece

    def _shorten(self) -> None:
        window = self._window[-_CONTEXT:]
        length = len(self._decode(window))
        # the two texts may differ at their start, not at their end
        if length > len(self._held):
            self._window, self._given = window, length - len(self._held)

    def _kind(self, token: int) -> int:
        """Which byte a token stands for; whether it is dropped."""
        kind = self._kinds.get(token)
        if kind is None:
            kind = self._kinds[token] = self._find_kind(token)
        return kind

    def _find_kind(self, token: int) -> int:
        name = self._tokenizer.convert_ids_to_tokens(token)
        # models may know more ids than their tokenizer
        if name is None or (token in self._special and not self._decode([token])):
            return _DROPPED
        byte = _BYTE.fullmatch(name)
        return int(byte[1], 16) if byte and self._decode([token]) != name else _PLAIN

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, **self._options)
        return text


class _Cleaner:
    """Applies a tokenizer's rules about spaces to text that comes in pieces."""

    def __init__(self, clean: Callable[[str], str]) -> None:
        self._clean = clean
        self._tail = ""

    def add(self, piece: str) -> str:
        self._tail += piece
        whole = self._clean(self._tail)
        # where no rule was applied across a cut, and every rule would have seen enough of what
        # follows, none will be
        for cut in range(len(self._tail) - _REACH, 0, -1):
            first = self._clean(self._tail[:cut])
            if first + self._clean(self._tail[cut:]) == whole:
                self._tail = self._tail[cut:]
                return first
        return ""

    def preview(self, text: str) -> str:
        return self._clean(self._tail + text)

    def end(self, text: str) -> str:
        whole, self._tail = self.preview(text), ""
        return whole


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that ``skip_special_tokens`` may leave out."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}


def _cleans_up(tokenizer: Any) -> bool:
    """Whether ``decode`` cleans up spaces where ``clean_up_tokenization_spaces`` is set."""
    text = "a ."
    if tokenizer.clean_up_tokenization(text) == text:
        return False
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # transformers leaves the text of byte-pair encodings alone unless it is told twice
    return type(getattr(backend, "model", None)).__name__ != "BPE" or bool(
        getattr(
            tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", 0
        )
    )


def _text_of_run(run: bytearray) -> str:
    try:
        return run.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(run)


def _split_run(run: bytearray) -> tuple[str, bytearray]:
    """The text of the whole characters, and the bytes of the one that is not."""
    for count in range(min(4, len(run) + 1)):
        try:
            return run[: len(run) - count].decode(), run[len(run) - count :]
        except UnicodeDecodeError:
            continue
    return _text_of_run(run), bytearray()
