"""What the operator of a server chooses."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from cats.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Limits and access of a server.

    Attributes:
        host: Address that it listens on.
        port: Its port; 0 takes a free one.
        api_keys: A request needs one of these; none lets everybody in.
        allowed_hosts: Further names under which clients may ask, where ``host`` is a loopback
            address. A web page elsewhere could otherwise name this machine as its own server.
        queue: How many answers may wait for a place beside those that decode.
        max_body: Bytes of the largest request.
        read_timeout: Seconds in which the headers, and then the body, have to arrive.
        request_timeout: Seconds in which an answer has to end, its time in the queue included.
        shutdown_timeout: Seconds that running answers have to end when the server is stopped.
        log_json: Write one JSON object for each request, instead of a line of text.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    queue: int = 64
    max_body: int = 4 * 2**20
    read_timeout: float = 30.0
    request_timeout: float = 600.0
    shutdown_timeout: float = 60.0
    log_json: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"expected a port from 0 to 65535, got {self.port}")
        if self.queue < 0:
            raise ConfigError(f"expected a queue of 0 or more answers, got {self.queue}")
        for name in ("max_body", "read_timeout", "request_timeout", "shutdown_timeout"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"expected a positive {name}, got {getattr(self, name)}")
        if not all(key and key.isascii() and key.strip() == key for key in self.api_keys):
            raise ConfigError("an API key is some ASCII characters without spaces around them")

    @property
    def is_local(self) -> bool:
        """Whether only programs of this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
