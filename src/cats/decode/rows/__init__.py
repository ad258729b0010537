"""Many sessions on one model: rows of different lengths, decoded together."""

from cats.decode.rows.open_session import Answer, OpenSession
from cats.decode.rows.sessions import Sessions

__all__ = ["Answer", "OpenSession", "Sessions"]
