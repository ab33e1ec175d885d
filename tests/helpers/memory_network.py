"""
Connections between engines on one loop, for tests: no socket, so time may jump, and all can be cut.

    network = MemoryNetwork()
    network.cut()            every connection breaks, on both sides
    network.is_down = True   and no other comes about
"""

from __future__ import annotations

import asyncio

from mock_engine.kv_channel import Channel, ChannelError


class _End:
    """What one side writes to: the other side's reader. A close is seen on both."""

    def __init__(self, own: asyncio.StreamReader, other: asyncio.StreamReader) -> None:
        self._readers = own, other
        self._is_closed = False

    def write(self, data: bytes) -> None:
        if not self._readers[1].at_eof() and not self._is_closed:
            self._readers[1].feed_data(data)

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            for reader in self._readers:
                reader.feed_eof()


class MemoryNetwork:
    """What `kv_channel.TcpNetwork` offers."""

    def __init__(self) -> None:
        self.is_down = False
        self.connect_s = 0.0  # how long it takes to connect
        self.num_connections = 0
        self._serves: dict[int, object] = {}
        self._ends: list[_End] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self, _host, serve):
        listener = _Listener(self, 9000 + len(self._serves))
        self._serves[listener.port] = serve
        return listener

    async def connect(self, _host, port):
        await asyncio.sleep(self.connect_s)
        if self.is_down or port not in self._serves:
            raise ChannelError(f"nobody listens on {port}")
        self.num_connections += 1
        near, far = asyncio.StreamReader(), asyncio.StreamReader()
        near_end, far_end = _End(near, far), _End(far, near)
        self._ends += [near_end, far_end]

        async def serve():
            try:
                await self._serves[port](Channel(far, far_end))
            finally:
                far_end.close()

        task = asyncio.ensure_future(serve())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return Channel(near, near_end)

    def cut(self):
        for end in self._ends:
            end.close()


class _Listener:
    def __init__(self, network: MemoryNetwork, port: int) -> None:
        self.port = port
        self._network = network

    def close(self):
        self._network._serves.pop(self.port, None)
