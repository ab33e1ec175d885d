"""Broken engines for the rules on cancelled requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from conformance.selftest.mutants import mutant
from conformance.selftest.toy import ToyEngine, Work, logger


@mutant("cancel.pre_first", "never looks at the context; only abort stops a request")
@mutant("cancel.mid", "never looks at the context; only abort stops a request")
class NeverLooksAtContext(ToyEngine):
    def is_cancelled(self, work: Work, context: Any) -> bool:
        del context
        return work.is_aborted


@mutant("cancel.pre_first", "a cancelled request ends with finish_reason stop")
@mutant("cancel.mid", "a cancelled request ends with finish_reason stop")
class SaysStopForCancelled(ToyEngine):
    def cancelled(self, work: Work) -> dict[str, Any]:
        return {**super().cancelled(work), "finish_reason": "stop"}


@mutant("cancel.pre_first", "the stream of a cancelled request ends without a terminal chunk")
class EndsSilently(ToyEngine):
    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
        async for chunk in super().generate(request, context):
            if chunk.get("finish_reason") == "cancelled":
                return
            yield chunk


@mutant("cancel.mid", "a cancelled request raises")
class RaisesWhenCancelled(ToyEngine):
    def cancelled(self, work: Work) -> dict[str, Any]:
        raise RuntimeError(f"{work.request_id} was cancelled")


@mutant("cancel.mid", "looks at the context before the first token only")
class LooksOnce(ToyEngine):
    def is_cancelled(self, work: Work, context: Any) -> bool:
        return not work.output and super().is_cancelled(work, context)


@mutant("cancel.mid", "looks at the context every eighth token")
class LooksRarely(ToyEngine):
    def is_cancelled(self, work: Work, context: Any) -> bool:
        return len(work.output) % 8 == 0 and super().is_cancelled(work, context)


@mutant("cancel.race_last", "a stop in the last step gives both terminals")
class BothTerminals(ToyEngine):
    def is_cancelled(self, work: Work, context: Any) -> bool:
        return len(work.output) < work.max_tokens - 1 and super().is_cancelled(work, context)

    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
        async for chunk in super().generate(request, context):
            yield chunk
            if chunk.get("finish_reason") == "length" and context.is_stopped():
                yield {"token_ids": [], "index": 0, "finish_reason": "cancelled"}


@mutant("cancel.race_last", "a stop in the last step raises")
class RaisesInLastStep(ToyEngine):
    async def step(self, work: Work, context: Any) -> None:
        await super().step(work, context)
        if len(work.output) == work.max_tokens - 1 and context.is_stopped():
            raise RuntimeError("the request is gone")


@mutant(
    "cancel.blocked",
    "learns its request id from the first output, and cannot be cancelled before it",
    seen_in="dynamo#14368",
    engine_args="--step-s 0.1",
)
class CannotBeCancelledBeforeFirstOutput(ToyEngine):
    def abort_work(self, work: Work) -> None:
        if work.output:
            super().abort_work(work)

    def is_cancelled(self, work: Work, context: Any) -> bool:
        return bool(work.output) and super().is_cancelled(work, context)


@mutant("cancel.blocked", "nothing wakes a request that waits in the queue", engine_args="--step-s 0.1")
class SleepsInQueue(ToyEngine):
    async def wait_for_slot(self, work: Work, context: Any) -> bool:
        while not work.has_slot and self.num_slots_used >= self.options.max_num_seqs:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return await super().wait_for_slot(work, context)


@mutant("cancel.blocked", "a stop in the middle of a step is forgotten")
class StepForgetsStop(ToyEngine):
    async def step(self, work: Work, context: Any) -> None:
        was_stopped = context.is_stopped()
        await super().step(work, context)
        if not was_stopped and context.is_stopped():
            vars(work)["is_deaf"] = True

    def is_cancelled(self, work: Work, context: Any) -> bool:
        return "is_deaf" not in vars(work) and super().is_cancelled(work, context)


@mutant("cancel.abort_path", "abort makes the stream raise")
class AbortedStreamRaises(ToyEngine):
    async def step(self, work: Work, context: Any) -> None:
        await super().step(work, context)
        if work.is_aborted:
            raise RuntimeError("the request was aborted")


@mutant("cancel.abort_path", "abort before the first token kills the engine", seen_in="dynamo#8624")
class AbortBeforeFirstTokenKills(ToyEngine):
    def abort_work(self, work: Work) -> None:
        super().abort_work(work)
        if not work.output:
            self.is_running = False


@mutant("cancel.abort_path", "abort raises")
class AbortRaises(ToyEngine):
    async def abort(self, context: Any) -> None:
        await super().abort(context)
        raise NotImplementedError


@mutant("cancel.usage", "the usage of a cancelled request is its whole budget")
class UsageIsBudget(ToyEngine):
    def cancelled(self, work: Work) -> dict[str, Any]:
        chunk = super().cancelled(work)
        chunk["completion_usage"]["completion_tokens"] = work.max_tokens
        return chunk


@mutant("cancel.usage", "the usage counts the token that was thrown away")
class UsageCountsLostToken(ToyEngine):
    def cancelled(self, work: Work) -> dict[str, Any]:
        chunk = super().cancelled(work)
        if work.has_slot:
            chunk["completion_usage"]["completion_tokens"] += 1
        return chunk


@mutant("cancel.killed", "a killed request goes on")
class KilledGoesOn(ToyEngine):
    def is_cancelled(self, work: Work, context: Any) -> bool:
        return super().is_cancelled(work, context) and not context.is_killed()


@mutant("cancel.killed", "a killed request raises")
class KilledRaises(ToyEngine):
    def cancelled(self, work: Work) -> dict[str, Any]:
        if vars(work).get("is_killed"):
            raise ConnectionError("the client is gone")
        return super().cancelled(work)

    def is_cancelled(self, work: Work, context: Any) -> bool:
        vars(work)["is_killed"] = context.is_killed()
        return super().is_cancelled(work, context)


@mutant("cancel.after_terminal", "aborts finished requests too, and says so as an error", seen_in="ROCm/ATOM#1589")
class AbortsFinished(ToyEngine):
    def release(self, work: Work) -> None:
        super().release(work)
        logger.error("cannot abort request %s: it is not running", work.request_id)


@mutant(
    "cancel.after_terminal",
    "an abort that finds nothing stops the request that comes next",
    seen_in="tenstorrent/tt-inference-server#4818",
)
class LateAbortHitsNext(ToyEngine):
    is_pending = False

    async def abort(self, context: Any) -> None:
        self.is_pending = context.id() not in self.open
        await super().abort(context)

    def admit(self, request: Mapping[str, Any], context: Any) -> Work:
        work = super().admit(request, context)
        work.is_aborted, self.is_pending = self.is_pending, False
        return work


@mutant("cancel.after_terminal", "abort of a finished request raises")
class LateAbortRaises(ToyEngine):
    async def abort(self, context: Any) -> None:
        for work in self.open[context.id()]:
            self.abort_work(work)
