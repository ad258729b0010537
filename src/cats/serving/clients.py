"""Clients of the server that only read streams, for measurements; they need no torch."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from cats.errors import DataError

_PATH = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds of one round, and of the first token of each stream."""

    seconds: float
    firsts: Sequence[float] = ()


def clients_round(port: int, bodies: list[bytes], new_tokens: int) -> Round:
    """Send all requests at once, and read their streams to the end.

    Args:
        port: Of a server on this machine.
        bodies: Of requests for streams with usage.
        new_tokens: That each answer has to have.

    Raises:
        DataError: If one has another number.
    """

    async def all_streams() -> Round:
        start = time.perf_counter()
        firsts = await asyncio.gather(*(_stream(port, body, new_tokens) for body in bodies))
        return Round(time.perf_counter() - start, firsts)

    return asyncio.run(all_streams())


async def _stream(port: int, body: bytes, new_tokens: int) -> float:
    """Read one stream to its end; seconds until its first token."""
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        f"POST {_PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
        + body
    )
    first: float | None = None
    last = b""
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            if first is None:
                first = time.perf_counter() - start
            last = line
    writer.close()
    usage = json.loads(last.removeprefix(b"data: ")).get("usage") if last else None
    if first is None or not usage or usage["completion_tokens"] != new_tokens:
        raise DataError(f"expected {new_tokens} tokens, the server gave {last[:300]!r}")
    return first
