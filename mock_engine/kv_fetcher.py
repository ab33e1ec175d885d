"""
The decode side of a transfer: blocks for a KV cache, the link on which it comes, and then the queue.

    fetcher = KvFetcher(drive, TcpNetwork())
    fetcher.fetch(stream, handoff)      `stream` was prepared; it is queued when its KV cache is there
    await fetcher.stop()

One KV cache comes at a time, first come, first served. Where one does not come, because the prefill worker is gone or
has given it up, the prompt is computed here instead: no request is lost, it only takes longer (vLLM has the same:
kv_load_failure_policy "recompute"). Cancelling the stream hangs up, which gives the blocks back on the other side too.
"""

from __future__ import annotations

import asyncio
import logging

from mock_engine.drive_realtime import RealTimeDrive, Stream
from mock_engine.handoff import Handoff
from mock_engine.kv_channel import Channel, ChannelError, Network
from mock_engine.kv_sender import HUNG_S

logger = logging.getLogger(__name__)

_CONNECT_S = 5.0  # real seconds to find out that a prefill worker is not there


class KvFetcher:
    """All KV caches that are on their way to one engine. Belongs on the drive's loop."""

    def __init__(self, drive: RealTimeDrive, network: Network) -> None:
        self.num_failed = 0  # and computed here
        self._drive = drive
        self._network = network
        self._link = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_open(self) -> int:
        """KV caches on their way."""
        return len(self._tasks)

    def fetch(self, stream: Stream, handoff: Handoff) -> None:
        """Begin."""
        task = asyncio.ensure_future(self._fetch(stream, handoff))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Hang up everywhere. The drive has stopped, so all streams are cancelled. Safe twice."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _fetch(self, stream: Stream, handoff: Handoff) -> None:
        channel: Channel | None = None
        try:
            # A stream that is cancelled meanwhile does not end this: the prefill worker must hear of it.
            async with asyncio.timeout(_CONNECT_S):
                channel = await self._network.connect(handoff.host, handoff.port)
            channel.send(fetch=handoff.handle)
            if stream.is_cancelled:
                return
            task = asyncio.current_task()
            assert task is not None
            stream.on_cancelled = task.cancel
            async with asyncio.timeout(HUNG_S):
                await self._take_blocks(stream)
                channel.send(ready=True)
                await channel.receive("send")
                async with self._link:
                    channel.send(go=True)
                    await channel.receive("sent")
        except (ChannelError, TimeoutError) as error:
            level = logging.DEBUG if self.num_failed else logging.WARNING
            self.num_failed += 1
            logger.log(level, "a KV cache did not come, and is computed here: %s. Warned of once.", repr(error))
            self._drive.forget_remote(stream)
        finally:
            stream.on_cancelled = None
            if channel is not None:
                channel.close()
        self._drive.enqueue(stream)

    async def _take_blocks(self, stream: Stream) -> None:
        has_blocks = asyncio.Event()
        self._drive.want(stream, has_blocks.set)
        await has_blocks.wait()
