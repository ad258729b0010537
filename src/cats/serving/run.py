"""Runs the server until it is stopped."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cats.errors import ConfigError
from cats.serving import log
from cats.serving.app import make_app
from cats.serving.errors import refused
from cats.serving.gate import LARGEST_HEADERS
from cats.serving.models import Models
from cats.serving.settings import Settings

# Idle connections are closed after so many seconds.
_KEEP_ALIVE = 30


class Protocol(H11Protocol):
    """uvicorn's protocol, which waits for the headers of a request for a while only.

    Clients that send nothing would otherwise hold their connections without end.
    """

    read_timeout = 30.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # the same timer as for idle connections: a request takes it away
        self.timeout_keep_alive_task = self.loop.call_later(
            self.read_timeout, self.timeout_keep_alive_handler
        )

    def data_received(self, data: bytes) -> None:
        timer = self.timeout_keep_alive_task
        # a part of the headers does not stop the clock
        self.timeout_keep_alive_task = None
        super().data_received(data)
        in_request = self.cycle is not None and not self.cycle.response_complete
        if timer is not None and (in_request or self.timeout_keep_alive_task is not None):
            timer.cancel()
        elif timer is not None:
            self.timeout_keep_alive_task = timer

    def send_400_response(self, msg: str) -> None:
        """Say it in the form of all errors."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = json.dumps(
            refused(f"{msg} Headers may have {LARGEST_HEADERS} bytes.").body()
        ).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for part in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(part) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server, which ends the answers that are left when the time for it is over."""

    def __init__(self, config: uvicorn.Config, models: Models, timeout: float) -> None:
        super().__init__(config)
        self._models, self._timeout = models, timeout

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logging.getLogger("cats.serving").info(
            "stopping: running answers have %g seconds to end", self._timeout
        )
        loop = asyncio.get_running_loop()
        # the sessions end, so that their clients get an error instead of a closed connection
        timer = loop.call_later(self._timeout, loop.run_in_executor, None, self._models.close)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def listen(settings: Settings) -> socket.socket:
    """A socket on the server's address.

    Raises:
        ConfigError: If there is no such address, or another program has the port.
    """
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror or error}): choose "
            "another --host or --port, or stop the program that has it"
        ) from error
    return listener


def run(
    models: Models,
    settings: Settings,
    *,
    on_start: Callable[[str], object] = lambda address: None,
) -> None:
    """Serve until a signal comes; then running answers end first.

    Args:
        models: What is served; closed at the end.
        settings: Where, to whom, and how much.
        on_start: Called with the address before the first request.

    Raises:
        ConfigError: If the address cannot be used.
    """
    try:
        listener = listen(settings)
        log.set_up(as_json=settings.log_json)
        server = make_server(models, settings)
        host, port = listener.getsockname()[:2]
        on_start(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        server.run(sockets=[listener])
    finally:
        models.close()


def make_server(models: Models, settings: Settings) -> Server:
    """The server, which is not running yet."""
    protocol = type("TimedProtocol", (Protocol,), {"read_timeout": settings.read_timeout})
    config = uvicorn.Config(
        make_app(models, settings),
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        h11_max_incomplete_event_size=LARGEST_HEADERS,
        timeout_keep_alive=_KEEP_ALIVE,
        # a little more than the sessions have, for their last events
        timeout_graceful_shutdown=int(settings.shutdown_timeout) + 10,
    )
    return Server(config, models, settings.shutdown_timeout)
