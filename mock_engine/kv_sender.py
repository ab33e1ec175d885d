"""
The prefill side of a transfer: KV caches that wait to be fetched, and the link on which they go.

    sender = KvSender(drive, seconds_of, host, timeout_s, clock, TcpNetwork())
    await sender.start()
    handle = sender.offer(sequence)     its blocks are kept until it is fetched...
    sender.withdraw(handle)             ...or until this, on any thread, or `timeout_s` later
    await sender.stop()

One KV cache goes at a time, at full bandwidth (`kv_transfer`), first come, first served. A decode worker that goes
away, even by SIGKILL, closes its connection, and what it was fetching is given up at once.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable

from mock_engine.drive_realtime import Clock, RealTimeDrive
from mock_engine.kv_channel import Channel, ChannelError, Listener, Network
from mock_engine.sequence import SequenceState

logger = logging.getLogger(__name__)

HUNG_S = 480.0  # real seconds; a connection that is open for longer leads nowhere (vLLM's NIXL connector waits as long)


class KvSender:
    """
    All KV caches of one engine that are to be fetched. All but `withdraw` belongs on the drive's loop.

    `seconds_of` says how long the KV cache of so many tokens takes, in the model's time.
    """

    def __init__(
        self,
        drive: RealTimeDrive,
        seconds_of: Callable[[int], float],
        host: str,
        timeout_s: float,
        clock: Clock,
        network: Network,
    ) -> None:
        self.host = host
        self.num_sent = 0
        self.num_given_up = 0  # nobody came for them in time
        self._drive = drive
        self._seconds_of = seconds_of
        self._timeout_s = timeout_s
        self._clock = clock  # of its own: it has one waiter at a time, whose turn it is on the link
        self._network = network
        self._listener: Listener | None = None
        self._link = asyncio.Lock()
        self._handles = itertools.count(1)
        self._offers: dict[int, SequenceState] = {}  # what nobody has come for yet
        self._timers: dict[int, asyncio.TimerHandle] = {}  # when it is given up
        self._fetched: dict[asyncio.Task[None], SequenceState | None] = {}

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._listener is not None, "it has started"
        return self._listener.port

    @property
    def num_open(self) -> int:
        """KV caches that wait or are on their way."""
        return len(self._offers) + sum(sequence is not None for sequence in tuple(self._fetched.values()))

    async def start(self) -> None:
        """Listen. Raises OSError if the host is not ours."""
        self._listener = await self._network.listen(self.host, self._serve)

    async def stop(self) -> None:
        """Let go of everything. Safe twice, and before `start`."""
        if self._listener is not None:
            self._listener.close()
        for handle in tuple(self._offers):
            self.withdraw(handle)
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        tasks = tuple(self._fetched)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._clock.close()

    def offer(self, sequence: SequenceState) -> int:
        """This sequence has ended and keeps its blocks; a decode worker may ask for its handle from now on."""
        handle = next(self._handles)
        self._offers[handle] = sequence
        self._timers[handle] = asyncio.get_running_loop().call_later(self._timeout_s, self._give_up, handle)
        return handle

    def withdraw(self, handle: int) -> None:
        """Give the blocks back, unless somebody has come for them. Safe twice, and on any thread."""
        sequence = self._offers.pop(handle, None)
        if sequence is not None:
            self._drive.give_back(sequence)

    def _give_up(self, handle: int) -> None:
        self._timers.pop(handle)
        if handle in self._offers:
            level = logging.DEBUG if self.num_given_up else logging.WARNING
            self.num_given_up += 1
            logger.log(
                level,
                "nobody came for a KV cache within %g s; its blocks are given back. Warned of once.",
                self._timeout_s,
            )
            self.withdraw(handle)

    def _take(self, handle: int) -> SequenceState | None:
        """Somebody has come for it. None if it is not there any more."""
        timer = self._timers.pop(handle, None)
        if timer is not None:
            timer.cancel()
        return self._offers.pop(handle, None)

    async def _serve(self, channel: Channel) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._fetched[task] = None
        sending: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(HUNG_S):
                sequence = self._fetched[task] = self._take(int(await channel.receive("fetch")))
                if sequence is None:
                    return
                await channel.receive("ready")
                go = asyncio.Event()
                sending = asyncio.ensure_future(self._send(channel, sequence, go))
                await channel.receive("go")
                go.set()
                await channel.receive("nothing more")  # it hangs up when all is there, or when it is wanted no more
        except (ChannelError, TimeoutError, TypeError, ValueError) as error:
            logger.debug("a connection has ended: %s", repr(error))
        finally:
            if sending is not None:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
            sequence = self._fetched.pop(task)
            if sequence is not None:
                self._drive.give_back(sequence)

    async def _send(self, channel: Channel, sequence: SequenceState, go: asyncio.Event) -> None:
        async with self._link:
            model_s = self._seconds_of(sequence.request.isl_tokens)
            channel.send(send=model_s)
            await go.wait()
            await self._clock.wait_until(self._clock.now_s() + self._drive.real_s(model_s))
            self._drive.give_back(sequence)
            self.num_sent += 1
            channel.send(sent=True)
