"""Checkpoints of quantised models, one file per format: from their tensors to our codes and back.

Nothing is lost on the way: the numbers are, bit for bit, those of the format's own library, and a
saved checkpoint has the tensors that were read.
"""

from cats.formats.base import Format, Layer
from cats.formats.description import gguf_kinds, stored_kind, stored_layers
from cats.formats.gguf import split
from cats.formats.gguf_export import KINDS as GGUF_KINDS
from cats.formats.gguf_export import export_gguf
from cats.formats.gguf_tokenizer import has_tokenizer, mend_tokenizer_
from cats.formats.load import FORMATS, load, stored_format
from cats.formats.save import store_packed_

__all__ = [
    "FORMATS",
    "GGUF_KINDS",
    "Format",
    "Layer",
    "export_gguf",
    "gguf_kinds",
    "has_tokenizer",
    "load",
    "mend_tokenizer_",
    "split",
    "store_packed_",
    "stored_format",
    "stored_kind",
    "stored_layers",
]
