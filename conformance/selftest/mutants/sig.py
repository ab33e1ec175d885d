"""Engines with methods of a shape that the bridge does not take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from typing import Any

from conformance.release import submodule
from conformance.selftest.mutants import mutant
from conformance.selftest.toy import ToyEngine


@mutant("sig.generate", "generate is a coroutine that returns all chunks")
class ReturnsChunks(ToyEngine):
    async def generate(self, request: Mapping[str, Any], context: Any) -> Any:  # type: ignore[override]
        return [chunk async for chunk in super().generate(request, context)]


@mutant("sig.generate", "generate is a coroutine that returns the stream")
class ReturnsStream(ToyEngine):
    async def generate(self, request: Mapping[str, Any], context: Any) -> Any:  # type: ignore[override]
        return super().generate(request, context)


@mutant("sig.generate", "generate is a sync generator")
class SyncGenerator(ToyEngine):
    def generate(self, request: Mapping[str, Any], context: Any) -> Iterator[Any]:  # type: ignore[override]
        del request, context
        yield {"token_ids": [1], "index": 0, "finish_reason": "stop"}


class _Chunks:
    """Good for `async for`, which asks for an iterator first. The bridge does not."""

    def __init__(self, stream: AsyncGenerator[Any, None]) -> None:
        self.stream = stream

    def __aiter__(self) -> AsyncIterator[Any]:
        return self.stream


@mutant("sig.generate", "generate returns an object that has __aiter__ only")
class IterableOnly(ToyEngine):
    def generate(self, request: Mapping[str, Any], context: Any) -> Any:
        return _Chunks(super().generate(request, context))


@mutant("sig.generate", "the second parameter has another name")
class NamedCtx(ToyEngine):
    def generate(self, request: Mapping[str, Any], ctx: Any) -> Any:
        return super().generate(request, ctx)


@mutant("sig.generate", "generate takes the request alone")
class NoContext(ToyEngine):
    async def generate(self, request: Mapping[str, Any]) -> Any:  # type: ignore[override]
        yield {"token_ids": request["token_ids"][:1], "index": 0, "finish_reason": "stop"}


@mutant("sig.generate", "generate wants an event loop when it is called, before its first step")
class WantsLoopAtCall(ToyEngine):
    def generate(self, request: Mapping[str, Any], context: Any) -> Any:
        asyncio.get_running_loop()
        return super().generate(request, context)


@mutant("sig.async_hooks", "start is an ordinary method")
class SyncStart(ToyEngine):
    def start(self, worker_id: int) -> Any:
        del worker_id
        self.loop = asyncio.get_running_loop()
        self.is_running = True
        return self.engine_config()


@mutant("sig.async_hooks", "cleanup is an ordinary method")
class SyncCleanup(ToyEngine):
    def cleanup(self) -> Any:
        self.is_running = False
        if self.steps_task is not None:
            self.steps_task.cancel()
        self.release_all()


@mutant("sig.async_hooks", "abort is an ordinary method")
class SyncAbort(ToyEngine):
    def abort(self, context: Any) -> Any:
        for work in self.open.get(context.id(), ()):
            self.abort_work(work)


@mutant("sig.async_hooks", "abort has a yield, so that awaiting it fails")
class AbortYields(ToyEngine):
    async def abort(self, context: Any) -> Any:
        for work in self.open.get(context.id(), ()):
            self.abort_work(work)
            yield work


if submodule("publisher") is not None:

    @mutant("sig.async_hooks", "kv_event_sources is an ordinary method", engine_args="--kv-events")
    class SyncSources(ToyEngine):
        def kv_event_sources(self) -> Any:
            return []

    @mutant("sig.async_hooks", "on_ready is async, and so never runs", engine_args="--kv-events")
    class AsyncOnReady(ToyEngine):
        async def on_kv_ready(self, publisher: Any) -> Any:  # type: ignore[override]
            super().on_kv_ready(publisher)

    @mutant("sig.async_hooks", "component_metrics_dp_ranks is async", engine_args="--metrics")
    class AsyncRanks(ToyEngine):
        async def component_metrics_dp_ranks(self) -> Any:  # type: ignore[override]
            return [0]

    @mutant("sig.async_hooks", "attach_snapshot_publisher is async, and so never runs", engine_args="--metrics")
    class AsyncAttach(ToyEngine):
        async def attach_snapshot_publisher(self, publisher: Any) -> Any:  # type: ignore[override]
            self.snapshots = publisher

    @mutant("sig.async_hooks", "supported_controls is async", engine_args="--controls")
    class AsyncSupported(ToyEngine):
        async def supported_controls(self) -> Any:  # type: ignore[override]
            return set()

    @mutant("sig.async_hooks", "supported_updates is an attribute", engine_args="--controls")
    class SupportedIsSet(ToyEngine):
        supported_updates = frozenset({"max_num_seqs"})  # type: ignore[assignment]

    @mutant("sig.async_hooks", "health_check_payload is an ordinary method")
    class SyncPayload(ToyEngine):
        def health_check_payload(self) -> Any:
            return None
