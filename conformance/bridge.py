"""
How Dynamo's Rust worker drives a Python engine, in pure Python.

    stream = BridgeStream(engine, request, context)
    while (chunk := await stream.read()) is not None: ...
    await stream.drop()

Observed on ai-dynamo 1.2.1 to 1.6.1, and what `async for` does not show:

* `__anext__` is called on a thread without an event loop, and what it returns
  runs on the loop in a new Task each time.
* A stream is never closed. When nobody wants it any more its last reference
  is dropped, on a thread without an event loop.
* Reading stops at the first chunk with a `finish_reason`.
* `abort` gets a new context object with the same id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class BridgeContext:
    """The documented part of Dynamo's `Context`; anything else raises AttributeError."""

    def __init__(self, request_id: str, controller: BridgeContext | None = None) -> None:
        self._id = request_id
        self._stopped: list[bool] = controller._stopped if controller is not None else []

    def id(self) -> str:
        return self._id

    def is_stopped(self) -> bool:
        return bool(self._stopped)

    def is_killed(self) -> bool:
        return False

    def stop_generating(self) -> None:
        self._stopped.append(True)

    def fresh(self) -> BridgeContext:
        """Another object for the same request, as `abort` gets it."""
        return BridgeContext(self._id, self)


class BridgeStream:
    """One request on its way through the bridge. Errors of the engine come out of `read`."""

    def __init__(self, engine: Any, request: Mapping[str, Any], context: BridgeContext) -> None:
        self._engine = engine
        self.context = context
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bridge")
        self._held = [engine.generate(request, context=context)]
        self._is_over = False

    async def read(self) -> Mapping[str, Any] | None:
        """The next chunk; None after the terminal one, where the real adapter stops reading."""
        if self._is_over:
            return None
        loop = asyncio.get_running_loop()
        step = await loop.run_in_executor(self._thread, lambda: self._held[0].__anext__())
        try:
            chunk: Mapping[str, Any] = await loop.create_task(_run(step))
        except StopAsyncIteration:
            self._is_over = True
            return None
        self._is_over = bool(chunk.get("finish_reason"))
        return chunk

    async def abort(self) -> None:
        """Stop the request, and tell the engine so, as an explicit cancel or a noticed disconnect does."""
        self.context.stop_generating()
        await self._engine.abort(self.context.fresh())

    async def drop(self) -> None:
        """Let go of the stream on a thread without an event loop; it is never closed."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._held.clear)
        self._thread.shutdown()

    async def read_all(self) -> list[Mapping[str, Any]]:
        """All chunks up to the terminal one, then drop the stream."""
        chunks = []
        try:
            while (chunk := await self.read()) is not None:
                chunks.append(chunk)
        finally:
            await self.drop()
        return chunks


async def _run(step: Any) -> Any:
    return await step
