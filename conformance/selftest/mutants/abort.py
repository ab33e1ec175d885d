"""Broken engines for the rules on abort."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from conformance.selftest.mutants import mutant
from conformance.selftest.mutants.drop import leak
from conformance.selftest.toy import ToyEngine, Work


class ChoicesToy(ToyEngine):
    """Correct: offers n > 1. Every choice gets its tokens, and one terminal chunk ends them all."""

    def check_choices(self, n: int | None) -> None:
        pass

    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
        n = (request.get("sampling_options") or {}).get("n") or 1
        if n == 1 or self.role not in ("agg", "decode"):
            async for chunk in super().generate(request, context):
                yield chunk
            return
        work = self.admit(request, context)
        vars(work)["num_choices"] = n
        try:
            if not await self.wait_for_slot(work, context):
                yield self.cancelled(work)
                return
            self.take_blocks(work)
            while len(work.output) < n * work.max_tokens:
                await self.step(work, context)
                if self.is_cancelled(work, context):
                    yield self.cancelled(work)
                    return
                for choice in range(n):
                    token = self.next_token(work)
                    work.output.append(token)
                    chunk = {**self.chunk(work, token), "index": choice}
                    is_last = len(work.output) == n * work.max_tokens
                    yield {**chunk, **self.ending(work, "length")} if is_last else chunk
        finally:
            self.release(work)


@mutant("abort.by_id", "n > 1: abort stops nothing", seen_in="vllm#14326")
class AbortStopsNoChoices(ChoicesToy):
    def abort_work(self, work: Work) -> None:
        if vars(work).get("num_choices", 1) == 1:
            super().abort_work(work)


@mutant("abort.by_id", "finds the request by the context object")
class FindsByIdentity(ToyEngine):
    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.by_context: dict[Any, Work] = {}

    def admit(self, request: Mapping[str, Any], context: Any) -> Work:
        work = super().admit(request, context)
        self.by_context[context] = work
        return work

    def release(self, work: Work) -> None:
        super().release(work)
        self.by_context = {context: other for context, other in self.by_context.items() if other is not work}

    async def abort(self, context: Any) -> None:
        if context in self.by_context:
            self.abort_work(self.by_context[context])


@mutant("abort.unknown", "abort of a missing id raises", seen_in="tenstorrent/vllm#145")
class UnknownAbortRaises(ToyEngine):
    async def abort(self, context: Any) -> None:
        for work in self.open[context.id()]:
            self.abort_work(work)


@mutant("abort.unknown", "a KeyError in abort kills the worker's loop; later requests fail", seen_in="llm-d#187")
class UnknownAbortKills(ToyEngine):
    async def abort(self, context: Any) -> None:
        if context.id() not in self.open:
            self.is_running = False
        await super().abort(context)


@leak("abort.unknown", "remembers every id that was aborted")
class RemembersAborted(ToyEngine):
    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.aborted: set[str] = set()

    async def abort(self, context: Any) -> None:
        self.aborted.add(context.id())
        await super().abort(context)


@mutant("abort.unknown", "aborts every request whose id begins with the given one")
class AbortsByPrefix(ToyEngine):
    async def abort(self, context: Any) -> None:
        for request_id, works in self.open.items():
            if request_id.startswith(context.id()):
                for work in works:
                    self.abort_work(work)


@mutant("abort.twice", "the second abort finds nothing, and raises")
class SecondAbortRaises(ToyEngine):
    async def abort(self, context: Any) -> None:
        works = self.open.get(context.id(), [])
        if any(work.is_aborted for work in works):
            raise ValueError(f"{context.id()} is aborted already")
        await super().abort(context)


@mutant("abort.twice", "each abort gives the slot back")
class EachAbortGivesSlotBack(ToyEngine):
    def abort_work(self, work: Work) -> None:
        if work.is_aborted and work.has_slot:
            self.num_slots_used -= 1
        super().abort_work(work)


@leak(
    "abort.decode_defer",
    "a request that is dropped before its first token waits for an abort that does not come",
    role="decode",
)
class WaitsForAbort(ToyEngine):
    def release(self, work: Work) -> None:
        if len(work.output) > 1 or work.is_aborted:
            super().release(work)


@mutant("abort.decode_defer", "a late abort raises", role="decode")
class LateAbortOfDroppedRaises(ToyEngine):
    async def abort(self, context: Any) -> None:
        for work in self.open[context.id()]:
            self.abort_work(work)
