"""Decode with little overhead per token: one loop, and engines behind one small interface."""

from cats.decode.decoder import Decoder, generate
from cats.decode.engines import ENGINES
from cats.decode.rows import OpenSession, Sessions
from cats.decode.runner import release

__all__ = ["ENGINES", "Decoder", "OpenSession", "Sessions", "generate", "release"]
