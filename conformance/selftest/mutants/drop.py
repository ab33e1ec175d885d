"""Broken engines for the rules on streams that nobody reads any more."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from conformance.selftest.mutants import T, mutant
from conformance.selftest.toy import ToyEngine, Work
from conformance.settings import Role


def leak(rule_id: str, what: str, *, seen_in: str = "", engine_args: str = "", role: Role = "agg") -> Callable[[T], T]:
    """Register a broken engine twice: with the probe, and as `<name>Unseen` without it."""

    def register(engine_class: T) -> T:
        mutant(rule_id, what, seen_in=seen_in, engine_args=engine_args, role=role)(engine_class)
        name = f"{engine_class.__name__}Unseen"
        module = sys.modules[engine_class.__module__]
        unseen = getattr(module, name, None) or type(
            name, (engine_class,), {"conformance_probe": None, "__module__": engine_class.__module__}
        )
        setattr(module, name, unseen)
        mutant(rule_id, f"{what} (no probe)", seen_in=seen_in, engine_args=engine_args, role=role)(unseen)
        return engine_class

    return register


def leaves_with(kind: type[BaseException]) -> bool:
    """Whether the `finally` that runs now was reached by such an exception."""
    found = sys.exc_info()[0]
    return found is not None and issubclass(found, kind)


@leak("drop.aclose", "releases on CancelledError only", seen_in="vllm#19225")
@leak("drop.foreign_thread", "releases on CancelledError only", seen_in="vllm#19225")
class ReleasesOnCancelledErrorOnly(ToyEngine):
    def release(self, work: Work) -> None:
        if not leaves_with(GeneratorExit):
            super().release(work)


@mutant("drop.aclose", "yields once more when it is closed")
class YieldsWhenClosed(ToyEngine):
    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
        inner = super().generate(request, context)
        try:
            async for chunk in inner:
                yield chunk
        except GeneratorExit:
            await inner.aclose()
            yield {"token_ids": [], "index": 0, "finish_reason": "cancelled"}


@leak("drop.foreign_thread", "awaits inside finally before it releases", seen_in="TensorRT-LLM engine of dynamo 1.3.1")
class AwaitsInFinally(ToyEngine):
    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
        try:
            async for chunk in super().generate(request, context):
                yield chunk
        finally:
            await asyncio.sleep(0)
            for work in list(self.open.get(context.id(), ())):
                super().release(work)

    def release(self, work: Work) -> None:
        pass


@leak("drop.foreign_thread", "the release needs the running event loop")
class ReleaseNeedsLoop(ToyEngine):
    def release(self, work: Work) -> None:
        asyncio.get_running_loop()
        super().release(work)


@mutant("drop.foreign_thread", "the release calls the event loop from another thread")
class ReleaseCallsLoopFromAnyThread(ToyEngine):
    def release(self, work: Work) -> None:
        super().release(work)
        if self.loop is not None:
            self.loop.call_soon(self.publish_snapshot)


@mutant(
    "drop.foreign_thread",
    "an early close submits no abort; the answer is computed to its end",
    seen_in="dynamo#15161",
    engine_args="--step-s 0.1",
)
@mutant(
    "drop.aclose",
    "an early close submits no abort; the answer is computed to its end",
    seen_in="dynamo#15161",
    engine_args="--step-s 0.1",
)
class EarlyCloseSubmitsNoAbort(ToyEngine):
    def release(self, work: Work) -> None:
        if leaves_with(GeneratorExit) and self.loop is not None:
            rest_s = (work.max_tokens - len(work.output)) * self.options.step_s
            self.loop.call_soon_threadsafe(self.loop.call_later, rest_s, super().release, work)
        else:
            super().release(work)


@mutant("drop.nested", "keeps the inner generator of a dropped stream")
class KeepsInnerGenerator(ToyEngine):
    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.inner: list[Any] = []

    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
        inner = super().generate(request, context)
        self.inner.append(inner)
        async for chunk in inner:
            yield chunk
        self.inner.remove(inner)


@mutant("drop.task_cancel", "swallows CancelledError and goes on")
class SwallowsCancelledError(ToyEngine):
    async def step(self, work: Work, context: Any) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await super().step(work, context)


@mutant("drop.task_cancel", "turns CancelledError into an error of its own")
class RenamesCancelledError(ToyEngine):
    async def step(self, work: Work, context: Any) -> None:
        try:
            await super().step(work, context)
        except asyncio.CancelledError:
            raise RuntimeError("the step was interrupted") from None


@leak("drop.task_cancel", "does not release on CancelledError")
class LeaksOnCancelledError(ToyEngine):
    def release(self, work: Work) -> None:
        if not leaves_with(asyncio.CancelledError):
            super().release(work)


@leak("drop.no_state", "keeps every request in its map")
class ForgetsNothing(ToyEngine):
    def forget(self, work: Work) -> None:
        pass


@leak("drop.no_state", "keeps a list of all requests that ended")
class KeepsHistory(ToyEngine):
    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.history: list[str] = []

    def release(self, work: Work) -> None:
        super().release(work)
        self.history.append(work.request_id)


@leak("drop.no_state", "the KV blocks of a dropped request stay pinned")
class PinsBlocksOfDropped(ToyEngine):
    def give_blocks_back(self, work: Work) -> None:
        if len(work.output) >= work.max_tokens or not leaves_with(GeneratorExit):
            super().give_blocks_back(work)


@leak("drop.no_state", "a cancel in the last step counts as success, and the KV stays pinned", seen_in="vllm#29987")
class PinsBlocksOfLastStep(ToyEngine):
    def admit(self, request: Mapping[str, Any], context: Any) -> Work:
        work = super().admit(request, context)
        vars(work)["context"] = context
        return work

    def is_cancelled(self, work: Work, context: Any) -> bool:
        return len(work.output) < work.max_tokens - 1 and super().is_cancelled(work, context)

    def give_blocks_back(self, work: Work) -> None:
        if len(work.output) < work.max_tokens or not vars(work)["context"].is_stopped():
            super().give_blocks_back(work)


@leak("drop.no_state", "a request that is aborted in the queue keeps a slot", seen_in="sglang#9817, sglang#21652")
class LeaksSlotOfQueued(ToyEngine):
    async def wait_for_slot(self, work: Work, context: Any) -> bool:
        had_to_wait = self.num_slots_used >= self.options.max_num_seqs
        has_slot = await super().wait_for_slot(work, context)
        if had_to_wait and not has_slot and not work.has_slot:
            self.num_slots_used += 1
        return has_slot


@leak("drop.no_state", "a cancel during prefill hangs the next request", seen_in="dynamo#4177")
class CancelInPrefillHangsNext(ToyEngine):
    is_stuck = False

    def release(self, work: Work) -> None:
        self.is_stuck = self.is_stuck or (work.has_slot and not work.output)
        super().release(work)

    async def wait_for_slot(self, work: Work, context: Any) -> bool:
        while self.is_stuck and not self.is_cancelled(work, context):  # noqa: ASYNC110
            await asyncio.sleep(0.5)
        return await super().wait_for_slot(work, context)


@leak("drop.no_state", "a request that is refused was registered before it was checked")
class RegistersBeforeChecks(ToyEngine):
    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.seen: dict[str, Any] = {}

    def admit(self, request: Mapping[str, Any], context: Any) -> Work:
        self.seen[context.id()] = request
        return super().admit(request, context)

    def release(self, work: Work) -> None:
        super().release(work)
        self.seen.pop(work.request_id, None)


@leak("drop.no_state", "a task that watches for the cancel of each request is never ended")
class WatcherNeverEnds(ToyEngine):
    def admit(self, request: Mapping[str, Any], context: Any) -> Work:
        work = super().admit(request, context)
        vars(work)["watcher"] = asyncio.ensure_future(self.watch(work, context))
        return work

    async def watch(self, work: Work, context: Any) -> None:
        while not context.is_stopped():  # noqa: ASYNC110
            await asyncio.sleep(100)
        work.is_aborted = True


class TransferringToy(ToyEngine):
    """Correct: in the prefill role the KV blocks of an answer stay until a decode worker has fetched them."""

    transfer_s = 0.05

    def release(self, work: Work) -> None:
        is_whole = len(work.output) >= work.max_tokens
        if self.role != "prefill" or not self.is_running or not is_whole or work.request_id in self.transfers:
            super().release(work)
            return
        self.transfers.add(work.request_id)
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.loop.call_later, self.transfer_s, self.end_transfer, work)

    def end_transfer(self, work: Work) -> None:
        super().release(work)
        self.transfers.discard(work.request_id)


@leak(
    "drop.no_state",
    "blocks stay pinned if the request is cancelled in the middle of the transfer",
    role="prefill",
    seen_in="dynamo#7489, TensorRT-LLM#12314",
)
class PinsBlocksOfCancelledTransfer(TransferringToy):
    async def abort(self, context: Any) -> None:
        await super().abort(context)
        self.transfers.discard(context.id())

    def end_transfer(self, work: Work) -> None:
        if work.request_id in self.transfers:
            super().end_transfer(work)
