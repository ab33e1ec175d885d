"""Broken engines for the rules on an engine's life."""

from __future__ import annotations

import asyncio
import queue
import subprocess
import threading
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from conformance.selftest.mutants import mutant
from conformance.selftest.mutants.drop import leak
from conformance.selftest.toy import ToyEngine, Work

_CHILD_S = "3"  # a child that nobody ends ends by itself


@mutant("life.cleanup_never_started", "cleanup needs what start makes")
class CleanupNeedsStart(ToyEngine):
    async def cleanup(self) -> None:
        self.loop.call_soon(self.publish_snapshot)  # type: ignore[union-attr]
        await super().cleanup()


@mutant("life.cleanup_twice", "the second cleanup raises")
class SecondCleanupRaises(ToyEngine):
    was_cleaned = False

    async def cleanup(self) -> None:
        if self.was_cleaned:
            raise RuntimeError("the engine is shut down already")
        self.was_cleaned = True
        await super().cleanup()


@mutant("life.cleanup_twice", "the second cleanup waits for an answer that never comes")
class SecondCleanupHangs(ToyEngine):
    was_cleaned = False

    async def cleanup(self) -> None:
        if self.was_cleaned:
            await asyncio.sleep(1000)
        self.was_cleaned = True
        await super().cleanup()


@mutant("life.cleanup_partial", "a child process survives a start that failed", seen_in="dynamo#2894")
class ChildSurvivesFailedStart(ToyEngine):
    child: subprocess.Popen[bytes] | None = None

    async def start(self, worker_id: int) -> Any:
        self.child = subprocess.Popen(["sleep", _CHILD_S])  # noqa: ASYNC220
        return await super().start(worker_id)

    async def cleanup(self) -> None:
        if self.child is not None and self.is_running:
            self.child.kill()
            self.child.wait()
        await super().cleanup()


class ChildSurvivesFailedStartUnseen(ChildSurvivesFailedStart):
    conformance_probe = None  # type: ignore[assignment]


mutant("life.cleanup_partial", "a child process survives a start that failed (no probe)", seen_in="dynamo#2894")(
    ChildSurvivesFailedStartUnseen
)


@leak("life.cleanup_partial", "cleanup reads what a failed start has not set")
class CleanupReadsTooMuch(ToyEngine):
    async def start(self, worker_id: int) -> Any:
        config = await super().start(worker_id)
        self.model = config.model
        return config

    async def cleanup(self) -> None:
        await super().cleanup()
        if self.loop is not None:
            del self.model


@leak("life.cleanup_partial", "cleanup does nothing after a failed start, and the task goes on")
class CleanupOnlyWhenRunning(ToyEngine):
    async def cleanup(self) -> None:
        if self.is_running:
            await super().cleanup()


@mutant("life.cleanup_inflight", "open streams wait for ever after cleanup")
class OpenStreamsHang(ToyEngine):
    async def step(self, work: Work, context: Any) -> None:
        await super().step(work, context)
        while not self.is_running:  # noqa: ASYNC110
            await asyncio.sleep(1)


@mutant("life.cleanup_inflight", "open streams raise an untyped error after cleanup")
class OpenStreamsRaise(ToyEngine):
    async def step(self, work: Work, context: Any) -> None:
        await super().step(work, context)
        if not self.is_running:
            raise RuntimeError("the engine process died")


@mutant("life.cleanup_inflight", "open streams end without a terminal chunk after cleanup")
class OpenStreamsEndSilently(ToyEngine):
    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
        async for chunk in super().generate(request, context):
            if not self.is_running:
                return
            yield chunk


@mutant("life.cleanup_quick", "cleanup gives the requests in flight a minute")
class CleanupWaitsForRequests(ToyEngine):
    async def cleanup(self) -> None:
        if self.open:
            await asyncio.sleep(60)
        await super().cleanup()


@mutant("life.cleanup_quick", "cleanup blocks the event loop")
class CleanupBlocks(ToyEngine):
    async def cleanup(self) -> None:
        if self.is_running:
            time.sleep(1.1)  # noqa: ASYNC251
        await super().cleanup()


@mutant("life.cleanup_noraise", "cleanup raises when requests are open")
class CleanupRaisesWithRequests(ToyEngine):
    async def cleanup(self) -> None:
        num_open = len(self.open)
        await super().cleanup()
        if num_open:
            raise RuntimeError(f"{num_open} requests were open")


@mutant("life.cleanup_noraise", "the shutdown coroutine is not awaited", seen_in="dynamo#9531")
class ShutdownNotAwaited(ToyEngine):
    async def cleanup(self) -> None:
        self.shut_down()  # type: ignore[unused-coroutine]

    async def shut_down(self) -> None:
        await super().cleanup()


@mutant("life.threads_stopped", "cleanup never stops the engine", seen_in="dynamo#8003")
class NeverStopsEngine(ToyEngine):
    async def cleanup(self) -> None:
        self.is_running = False
        self.release_all()


@mutant("life.threads_stopped", "the publisher thread goes on", engine_args="--kv-events")
class PublisherThreadGoesOn(ToyEngine):
    def on_kv_ready(self, publisher: Any) -> None:
        super().on_kv_ready(publisher)
        threading.Thread(target=time.sleep, args=(2,), name="toy-publisher", daemon=True).start()


@mutant("life.threads_stopped", "a file stays open")
class FileStaysOpen(ToyEngine):
    async def start(self, worker_id: int) -> Any:
        self.file = open("/proc/self/stat", "rb")  # noqa: ASYNC230, SIM115, PTH123
        self.pipe = subprocess.os.pipe()  # type: ignore[attr-defined]
        return await super().start(worker_id)


@mutant(
    "life.no_publish_after", "what is dropped after cleanup is still published", engine_args="--kv-events --metrics"
)
class PublishesAfterCleanup(ToyEngine):
    async def cleanup(self) -> None:
        publisher = self.blocks.publisher
        self.release_all = lambda: None  # type: ignore[method-assign]
        await super().cleanup()
        self.blocks.publisher = publisher


@mutant("life.no_publish_after", "the stats task goes on after cleanup", engine_args="--kv-events --metrics")
class StatsGoOn(ToyEngine):
    async def cleanup(self) -> None:
        snapshots, self.steps_task = self.snapshots, None
        await super().cleanup()
        self.snapshots, self.is_running = snapshots, True


@mutant("life.generate_after", "generate waits for the start that has been or never comes")
class GenerateWaitsForStart(ToyEngine):
    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
        while not self.is_running:  # noqa: ASYNC110
            await asyncio.sleep(1)
        async for chunk in super().generate(request, context):
            yield chunk


@mutant("life.generate_after", "generate fails over what start has not set")
class GenerateFailsUntyped(ToyEngine):
    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
        if not self.is_running:
            raise AttributeError("'NoneType' object has no attribute 'submit'")
        async for chunk in super().generate(request, context):
            yield chunk


@leak("life.soak", "a publish queue that nobody reads when KV routing is off", seen_in="the sample engine of dynamo")
class UnreadQueue(ToyEngine):
    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def take_blocks(self, work: Work) -> None:
        super().take_blocks(work)
        self.events.put(("stored", {"block_hashes": work.block_hashes}))


_SEEN: list[str] = []


@leak("life.soak", "a module-level list of all prompts")
class ModuleKeepsPrompts(ToyEngine):
    def admit(self, request: Mapping[str, Any], context: Any) -> Work:
        _SEEN.append(f"{context.id()} {request['token_ids']}" * 4)
        return super().admit(request, context)
