"""
How a decode worker talks to a prefill worker: lines of JSON on a connection of its own for each KV cache.

    decode: {"fetch": 7}          it wants KV cache 7, as long as the connection is open
    decode: {"ready": true}       it has blocks for it
    prefill: {"send": 0.0021}     its turn on the sending link has come; it takes so many of the model's seconds
    decode: {"go": true}          its turn on the receiving link has come
    prefill: {"sent": true}       the KV cache is there

A closed connection says that the other side has lost interest, whatever the reason: nothing else has to be heard for
the blocks to come back. `TcpNetwork` is the real thing; tests have one in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

_MAX_LINE_BYTES = 4096


class ChannelError(Exception):
    """The other side is gone, or says what it should not."""


class Writer(Protocol):
    """What is used of `asyncio.StreamWriter`."""

    def write(self, data: bytes, /) -> None: ...

    def close(self) -> None: ...


class Channel:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, **message: Any) -> None:
        """Put a message on its way; it is short and is not waited for."""
        self._writer.write(json.dumps(message).encode() + b"\n")

    async def receive(self, key: str) -> Any:
        """The value in the next message, which must have `key`. Raises `ChannelError`."""
        try:
            line = await self._reader.readline()
            return json.loads(line)[key]
        except (OSError, ValueError, KeyError, TypeError) as error:  # an empty line, at the end, is no JSON
            raise ChannelError(f"{key!r} was expected: {type(error).__name__}") from error

    def close(self) -> None:
        """Safe twice."""
        self._writer.close()


Serve = Callable[[Channel], Awaitable[None]]


class Listener(Protocol):
    """Takes connections until it is closed."""

    port: int

    def close(self) -> None: ...


class Network(Protocol):
    """Where workers find each other."""

    async def listen(self, host: str, serve: Serve) -> Listener: ...

    async def connect(self, host: str, port: int) -> Channel: ...


class _TcpListener:
    def __init__(self, server: asyncio.Server) -> None:
        self.port: int = server.sockets[0].getsockname()[1]
        self._server = server

    def close(self) -> None:
        self._server.close()


class TcpNetwork:
    """asyncio's streams, on any free port."""

    async def listen(self, host: str, serve: Serve) -> Listener:
        async def serve_streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await serve(Channel(reader, writer))
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

        return _TcpListener(await asyncio.start_server(serve_streams, host, 0, limit=_MAX_LINE_BYTES))

    async def connect(self, host: str, port: int) -> Channel:
        """Raises `ChannelError`."""
        try:
            reader, writer = await asyncio.open_connection(host, port, limit=_MAX_LINE_BYTES)
        except OSError as error:
            raise ChannelError(f"{host}:{port}: {error.strerror or error}") from error
        return Channel(reader, writer)
