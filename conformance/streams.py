"""
A request that is read by itself, in the background, and written down.

    stream = open_stream("bridge", engine, request, "r1", stop_after=2)
    transcript = await stream.finish(within_s=2.0)

What has to happen at an exact place in the stream (`stop_after`, `drop_after`)
happens between two reads, so every run of a seed does the same.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping
from typing import Any, Literal

from conformance.bridge import BridgeStream, PlainStream
from conformance.context import RequestContext
from conformance.transcript import Event, Transcript

DriverName = Literal["plain", "bridge", "worker"]


class Stream:
    """One request under way on the current loop. Everything that happens is in `transcript`."""

    def __init__(
        self,
        driver: DriverName,
        engine: Any,
        request: Mapping[str, Any],
        request_id: str,
        *,
        stop_after: int | None = None,
        drop_after: int | None = None,
        aborts: bool = False,
        reads_on: bool = False,
        context: RequestContext | None = None,
    ) -> None:
        """
        Begin to read at once.

        `stop_after`: stop the context when that many chunks were read (0: before the first read), and call
        `abort` beside it if `aborts`. `drop_after`: leave the stream there. `reads_on`: also after the terminal.
        """
        self._engine = engine
        self.context = context or RequestContext(request_id)
        self._driver = driver
        self._stop_after = stop_after
        self._drop_after = drop_after
        self._aborts = aborts
        self._reads_on = reads_on
        self._abort_tasks: list[asyncio.Task[None]] = []
        self._is_dropped = False
        self._progress = asyncio.Event()
        self._num_chunks = 0
        self._reader: BridgeStream | PlainStream | None = None
        loop = asyncio.get_running_loop()
        self._time = loop.time
        self._opened_s = loop.time()
        self.transcript = Transcript(request_id, request)
        self._pump_task = loop.create_task(self._pump(), name="conformance-pump")

    def note(self, kind: str, value: Any = None) -> None:
        self.transcript.events.append(Event(self._time() - self._opened_s, kind, value))

    @property
    def is_over(self) -> bool:
        return self._pump_task.done()

    @property
    def is_stepping(self) -> bool:
        """Whether the engine is at work on the next chunk: its task has begun, and waits for something."""
        task = self._reader.task if self._reader is not None else None
        if task is None or task.done():
            return False
        step = task.get_coro()
        return inspect.iscoroutine(step) and inspect.getcoroutinestate(step) == inspect.CORO_SUSPENDED

    def stop(self) -> None:
        """`context.stop_generating()`, and nothing else: the engine has to see it by itself."""
        self.note("stop")
        self.context.stop_generating()

    def kill(self) -> None:
        self.note("kill")
        self.context.kill()

    async def abort(self) -> None:
        """What a noticed disconnect does: the context is stopped, and `abort` called with a fresh one."""
        self.note("abort")
        self.context.stop_generating()
        await self._call_abort()

    async def _call_abort(self) -> None:
        try:
            await self._engine.abort(self.context.fresh())
        except Exception as error:
            self.note("error", _without_frames(error))

    async def drop(self) -> None:
        """Leave: the read under way goes on to its end, then the last reference goes. Returns without waiting."""
        self.note("drop")
        self._is_dropped = True

    def cancel_step(self) -> bool:
        """Cancel the task in which the step under way runs, as a shutdown does. False if none runs now."""
        task = self._reader.task if self._reader is not None else None
        if task is None or task.done():
            return False
        self.note("cancel")
        task.cancel()
        return True

    async def wait_chunks(self, num_chunks: int, within_s: float) -> bool:
        """Whether that many chunks came before the stream ended or the time was up."""
        try:
            async with asyncio.timeout(within_s):
                while self._num_chunks < num_chunks and not self.is_over:
                    self._progress.clear()
                    waiter = asyncio.ensure_future(self._progress.wait())
                    await asyncio.wait([waiter, self._pump_task], return_when=asyncio.FIRST_COMPLETED)
                    waiter.cancel()
        except TimeoutError:
            pass
        return self._num_chunks >= num_chunks

    async def finish(self, within_s: float) -> Transcript:
        """The transcript when all is over; with a "hang" event if it was not over in time."""
        done, _ = await asyncio.wait([self._pump_task], timeout=within_s)
        if not done:
            self.note("hang", f"not over after {within_s:g} s")
            self._pump_task.cancel()
            await asyncio.wait([self._pump_task], timeout=within_s)
        if self._abort_tasks:
            await asyncio.wait(self._abort_tasks, timeout=within_s)
        return self.transcript

    async def _pump(self) -> None:
        reader_class = PlainStream if self._driver == "plain" else BridgeStream
        reader: BridgeStream | PlainStream | None = None
        try:
            self._act()
            self._reader = reader = reader_class(
                self._engine, self.transcript.request, self.context, reads_on=self._reads_on
            )
            while not self._is_dropped:
                chunk = await reader.read()
                if self._is_dropped:
                    break
                if chunk is None:
                    self.note("end")
                    break
                self._num_chunks += 1
                self.note("chunk", chunk)
                self._act()
                self._progress.set()
        except asyncio.CancelledError as error:
            if self.transcript.of_kind("hang"):
                raise
            self.note("error", _without_frames(error))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self.note("error", _without_frames(error))
        finally:
            self._reader = None
            if reader is not None:
                await self._leave(reader)

    async def _leave(self, reader: BridgeStream | PlainStream) -> None:
        try:
            await reader.drop()
        except Exception as error:
            self.note("error", _without_frames(error))

    def _act(self) -> None:
        """What has to happen at exactly this place."""
        if self._stop_after is not None and self._num_chunks == self._stop_after:
            self.stop()
            if self._aborts:
                self._abort_tasks.append(asyncio.get_running_loop().create_task(self._call_abort()))
        if self._drop_after is not None and self._num_chunks == self._drop_after:
            self.note("drop")
            self._is_dropped = True


def _without_frames(error: BaseException) -> BaseException:
    """Frames hold the engine's locals, and would keep alive what a rule says must be gone."""
    return error.with_traceback(None)
