"""
How Dynamo's Rust worker drives a Python engine, in pure Python.

    stream = BridgeStream(engine, request, context)
    while (chunk := await stream.read()) is not None: ...
    await stream.drop()

Observed on ai-dynamo 1.2.1 to 1.6.1, and what `async for` does not show:

* `generate` and `__anext__` are called on a thread without an event loop; what
  `__anext__` returns runs on the loop in a new Task each time.
* A stream is never closed. When nobody wants it any more its last reference
  is dropped, on a thread without an event loop.
* Reading stops at the first chunk with a `finish_reason`.
* `abort` gets a new context object with the same id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from conformance.context import RequestContext

FOREIGN_THREAD = "foreign"  # how the thread without an event loop is called, for those who count threads
_foreign = ThreadPoolExecutor(1, thread_name_prefix=FOREIGN_THREAD)
_foreign.submit(int).result()  # it lives before any engine does, so that no engine is blamed for it


class BridgeStream:
    """One request on its way through the bridge. Errors of the engine come out of `read`."""

    def __init__(
        self, engine: Any, request: Mapping[str, Any], context: RequestContext, *, reads_on: bool = False
    ) -> None:
        """`reads_on`: go on after the terminal chunk, as Dynamo's own test kit does and its worker never does."""
        self._engine = engine
        self.context = context
        self._reads_on = reads_on
        self._request: Mapping[str, Any] | None = request
        self._held: list[Any] = []
        self._is_over = False
        self.task: asyncio.Task[Any] | None = None  # the step that runs now

    async def read(self) -> Mapping[str, Any] | None:
        """The next chunk; None after the terminal one, where the real adapter stops reading."""
        if self._is_over:
            return None
        step = await on_foreign_thread(self._next_step)
        self.task = asyncio.get_running_loop().create_task(_run(step))
        del step  # it holds the stream
        try:
            chunk: Mapping[str, Any] = await self.task
        except StopAsyncIteration:
            self._is_over = True
            return None
        finally:
            self.task = None
        self._is_over = not self._reads_on and isinstance(chunk, Mapping) and bool(chunk.get("finish_reason"))
        return chunk

    def _next_step(self) -> Any:
        if self._request is not None:
            self._held.append(self._engine.generate(self._request, context=self.context))
            self._request = None
        return self._held[0].__anext__()

    async def abort(self) -> None:
        """Stop the request, and tell the engine so, as an explicit cancel or a noticed disconnect does."""
        self.context.stop_generating()
        await self._engine.abort(self.context.fresh())

    async def drop(self) -> None:
        """Let go of the stream on a thread without an event loop; it is never closed."""
        await on_foreign_thread(self._held.clear)

    async def read_all(self) -> list[Mapping[str, Any]]:
        """All chunks up to the terminal one, then drop the stream."""
        chunks = []
        try:
            while (chunk := await self.read()) is not None:
                chunks.append(chunk)
        finally:
            await self.drop()
        return chunks


async def on_foreign_thread(call: Callable[[], Any]) -> Any:
    """Call it as Dynamo calls what is not asynchronous: on a thread without an event loop."""
    return await asyncio.get_running_loop().run_in_executor(_foreign, call)


async def _run(step: Any) -> Any:
    return await step


class PlainStream:
    """The same interface over a plain `async for`: one task, closed when it is dropped."""

    def __init__(
        self, engine: Any, request: Mapping[str, Any], context: RequestContext, *, reads_on: bool = True
    ) -> None:
        del reads_on  # a plain loop always reads to the end
        self._engine = engine
        self.context = context
        self._stream: Any = engine.generate(request, context=context)
        self.task: asyncio.Task[Any] | None = None

    async def read(self) -> Mapping[str, Any] | None:
        self.task = asyncio.current_task()
        try:
            chunk: Mapping[str, Any] = await self._stream.__anext__()
        except StopAsyncIteration:
            return None
        finally:
            self.task = None
        return chunk

    async def abort(self) -> None:
        self.context.stop_generating()
        await self._engine.abort(self.context.fresh())

    async def drop(self) -> None:
        await self._stream.aclose()
