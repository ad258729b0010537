"""Text of tokens that come one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from cats.protocols import Tokenizer

# Tokens that are decoded again for each new one: enough for any character and what is around it.
_CONTEXT = 16
# Characters held back where spaces are cleaned up: more than any rule looks at.
_REACH = 16
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# The kind of a token is the byte that it stands for, 0 to 255, or one of these.
_TEXT, _DROPPED = 256, 257


class Detokenizer:
    """Makes text of tokens as they come, and returns only what later tokens cannot change.

    Together, what :meth:`add` and :meth:`end` return is ``tokenizer.decode`` of all tokens. The
    following is held back for a while: bytes that are not a complete character yet; runs of byte
    tokens such as ``<0xF0>``, since one wrong byte changes the text of the run; and a few
    characters where the tokenizer cleans up spaces. The time is linear in the number of tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, prompt: Sequence[int] = (), skip_special_tokens: bool = False
    ) -> None:
        """
        Args:
            tokenizer: One of transformers.
            prompt: Token ids before the new ones. With them, the text is what the new tokens add to
                the prompt's text: a space at its start stays, which many tokenizers would drop.
            skip_special_tokens: As in ``tokenizer.decode``.
        """
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._kinds: dict[int, int] = {}
        self._special = _special_ids(tokenizer) if skip_special_tokens else frozenset()
        self._options = {"skip_special_tokens": skip_special_tokens}
        self._cleaner: _Cleaner | None = None
        if getattr(tokenizer, "clean_up_tokenization_spaces", False):
            self._options["clean_up_tokenization_spaces"] = False
            if _cleans_up(tokenizer):
                self._cleaner = _Cleaner(tokenizer.clean_up_tokenization)
        self._window: list[int] = []  # the last tokens; those before no longer matter
        self._returned = 0  # characters of the window's text that were returned
        self._held = ""  # the other characters, without those of the run
        self._run = bytearray()  # byte tokens at the end of the window
        self._begin(prompt)

    def add(self, tokens: Iterable[int]) -> str:
        """Take tokens of one row; returns the new text that is now certain, which may be empty."""
        piece = "".join(map(self._add, tokens))
        return piece if self._cleaner is None else self._cleaner.add(piece)

    @property
    def pending(self) -> str:
        """The text that is held back, as it would be if no token followed."""
        text = self._held + _text_of_run(self._run)
        if len(self._run) == len(self._window) and self._run.startswith(b" "):
            # the tokenizer may drop a space at the start of a text
            text = self._decode(self._window)
        return text if self._cleaner is None else self._cleaner.preview(text)

    def end(self) -> str:
        """The text that was held back."""
        text = self._decode(self._window)[self._returned :]
        self._returned += len(text)
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
        while before and self._kind(before[-1]) < _TEXT:
            self._run.insert(0, self._kind(before.pop()))
        text = self._decode(before) if before else ""
        self._returned = len(text) - text.endswith("\ufffd")
        self._held = text[self._returned :]
        if self._run:
            # if the new tokens complete a character, its first bytes are part of the new text
            characters, self._run = _split_run(self._run)
            self._returned = len(text) + len(characters)
            self._held = ""

    def _add(self, token: int) -> str:
        kind = self._kind(token)
        if kind == _DROPPED:
            return ""
        self._window.append(token)
        if kind < _TEXT:
            self._run.append(kind)
            return ""
        self._run.clear()
        text = self._decode(self._window)
        # only the last character may still get bytes
        certain = len(text) - text.endswith("\ufffd")
        piece = text[self._returned : certain]
        self._returned = max(self._returned, certain)
        self._held = text[self._returned :]
        if len(self._window) >= 2 * _CONTEXT:
            self._shorten()
        return piece

    def _shorten(self) -> None:
        window = self._window[-_CONTEXT:]
        length = len(self._decode(window))
        # the texts of both windows may differ at their start, but not at their end
        if length > len(self._held):
            self._window, self._returned = window, length - len(self._held)

    def _kind(self, token: int) -> int:
        """The byte that a token stands for, ``_TEXT`` or ``_DROPPED``."""
        kind = self._kinds.get(token)
        if kind is None:
            kind = self._kinds[token] = self._find_kind(token)
        return kind

    def _find_kind(self, token: int) -> int:
        # models may know more ids than their tokenizer, which then names them None
        name: str | None = self._tokenizer.convert_ids_to_tokens([token])[0]
        if name is None or (token in self._special and not self._decode([token])):
            return _DROPPED
        byte = _BYTE.fullmatch(name)
        return int(byte[1], 16) if byte and self._decode([token]) != name else _TEXT

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, **self._options)


class _Cleaner:
    """Applies a tokenizer's rules about spaces to text that comes in pieces."""

    def __init__(self, clean: Callable[[str], str]) -> None:
        self._clean = clean
        self._tail = ""

    def add(self, piece: str) -> str:
        self._tail += piece
        cleaned = self._clean(self._tail)
        # the text before a cut is certain if no rule changes text on both sides of it, and if
        # enough text follows for every rule to apply
        for cut in range(len(self._tail) - _REACH, 0, -1):
            first = self._clean(self._tail[:cut])
            if first + self._clean(self._tail[cut:]) == cleaned:
                self._tail = self._tail[cut:]
                return first
        return ""

    def preview(self, text: str) -> str:
        return self._clean(self._tail + text)

    def end(self, text: str) -> str:
        cleaned, self._tail = self.preview(text), ""
        return cleaned


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that ``skip_special_tokens`` may leave out."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}


def _cleans_up(tokenizer: Tokenizer) -> bool:
    """Whether ``decode`` cleans up spaces where ``clean_up_tokenization_spaces`` is set."""
    text = "a ."
    if tokenizer.clean_up_tokenization(text) == text:
        return False
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if type(getattr(backend, "model", None)).__name__ != "BPE":
        return True
    # transformers cleans up the text of byte-pair encodings only if this is set as well
    also_bpe = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    return bool(getattr(tokenizer, also_bpe, False))


def _text_of_run(run: bytearray) -> str:
    try:
        return run.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(run)


def _split_run(run: bytearray) -> tuple[str, bytearray]:
    """The text of the complete characters, and the bytes of an incomplete one at the end."""
    for count in range(min(4, len(run) + 1)):
        try:
            return run[: len(run) - count].decode(), run[len(run) - count :]
        except UnicodeDecodeError:
            continue
    return _text_of_run(run), bytearray()
