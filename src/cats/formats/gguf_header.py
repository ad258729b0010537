"""The header of a GGUF file: settings, and where its tensors are.

The package ``gguf`` makes several arrays of each token of a vocabulary, which takes seconds and a
hundred megabytes. Here, lists of strings are passed over.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Types of settings, by their numbers in the file.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        kind: How it is stored, such as ``"Q4_0"``.
        shape: Of the numbers, rows first.
        data: Its bytes, ``[..., bytes of a row]``, uint8, in the memory of the file.
    """

    kind: str
    shape: tuple[int, ...]
    data: np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself.

    Attributes:
        settings: Single numbers and strings by their names; lists are left out.
        tensors: By their names.
    """

    settings: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @classmethod
    def read(cls, path: Path) -> Self:
        """
        Raises:
            OSError: If the file cannot be read.
            ValueError: If it is no whole GGUF file; ``struct.error`` and ``KeyError`` too.
        """
        import gguf

        data: Any = np.memmap(path, mode="r", dtype=np.uint8)
        cursor = _Cursor(memoryview(data))
        if cursor.take(4) != _MAGIC:
            raise ValueError("it does not begin as a GGUF file")
        if (version := cursor.number("I")) not in _VERSIONS:
            raise ValueError(f"version {version} of the format, expected 2 or 3")
        tensor_count, setting_count = cursor.number("Q"), cursor.number("Q")
        settings = {}
        for _ in range(setting_count):
            name = cursor.string()
            value = cursor.value(cursor.number("I"))
            if value is not None:
                settings[name] = value
        described = [cursor.tensor() for _ in range(tensor_count)]
        alignment = settings.get("general.alignment", _ALIGNMENT)
        start = -(-cursor.at // alignment) * alignment
        tensors = {}
        for name, shape, number, offset in described:
            kind = gguf.GGMLQuantizationType(number)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            row = shape[-1] // block * size
            count = int(np.prod(shape[:-1], dtype=np.int64))
            first = start + offset
            if first + count * row > len(data) or shape[-1] % block:
                raise ValueError(f"{name} ends after the file")
            stored = data[first : first + count * row].reshape(*shape[:-1], row)
            tensors[name] = StoredTensor(kind.name, shape, stored)
        return cls(settings, tensors)


class _Cursor:
    """A place in the bytes of a file."""

    def __init__(self, data: memoryview) -> None:
        self._data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if self.at + count > len(self._data):
            raise ValueError("it ends early")
        self.at += count
        return bytes(self._data[self.at - count : self.at])

    def number(self, form: str) -> Any:
        (number,) = struct.unpack_from("<" + form, self._data, self.at)
        self.at += struct.calcsize(form)
        return number

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        """A number or a string; None for a list, which is passed over."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        item, count = self.number("I"), self.number("Q")
        if item in _SCALARS:
            self.at += count * struct.calcsize(_SCALARS[item])
        elif item == _STRING:
            for _ in range(count):
                self.at += 8 + struct.unpack_from("<Q", self._data, self.at)[0]
        else:
            raise ValueError(f"a list of things of the kind {item}")
        return None

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape with rows first, kind and offset."""
        name = self.string()
        shape = tuple(reversed([self.number("Q") for _ in range(self.number("I"))]))
        return name, shape, self.number("I"), self.number("Q")
