"""Checkpoints of quantised models, one file per format: from their tensors to our codes and back.

Nothing is lost on the way: the numbers are, bit for bit, those of the format's own library, and a
saved checkpoint has the tensors that were read.
"""

from cats.formats.base import Format, Layer
from cats.formats.gguf import split
from cats.formats.load import FORMATS, load, stored_format

__all__ = ["FORMATS", "Format", "Layer", "load", "split", "stored_format"]
