"""Broken engines for the rules on what comes before cleanup; other ones before 1.3 than from it on."""

from __future__ import annotations

import asyncio
from typing import Any

from conformance import release
from conformance.selftest.mutants import mutant
from conformance.selftest.mutants.drop import TransferringToy
from conformance.selftest.toy import ToyEngine

if release.is_at_least("1.3"):

    @mutant("drain.dead_code", "defines drain(), which nobody calls")
    class DefinesDrain(ToyEngine):
        async def drain(self) -> None:
            pass

    @mutant("drain.is_quiescent", "says True in the middle of a transfer", seen_in="dynamo#9344", role="prefill")
    class QuiescentInTransfer(TransferringToy):
        async def is_quiescent(self) -> bool:
            return True

    @mutant("drain.is_quiescent", "says how many requests are open", role="prefill")
    class QuiescentIsCount(ToyEngine):
        async def is_quiescent(self) -> bool:
            return len(self.open)  # type: ignore[return-value]

    @mutant("drain.is_quiescent", "never says True again", role="prefill")
    class NeverQuiescent(ToyEngine):
        num_requests = 0

        def admit(self, request: Any, context: Any) -> Any:
            self.num_requests += 1
            return super().admit(request, context)

        async def is_quiescent(self) -> bool:
            return not self.num_requests

    @mutant("drain.is_quiescent", "waits for the requests instead of looking", role="prefill", engine_args="--step-s 1")
    class QuiescentWaits(ToyEngine):
        async def is_quiescent(self) -> bool:
            while self.open:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            return True

    @mutant("drain.is_quiescent", "ends what is open when it is asked", role="prefill")
    class QuiescentEndsRequests(ToyEngine):
        async def is_quiescent(self) -> bool:
            if self.open:
                self.is_running = False
            return await super().is_quiescent()

else:

    @mutant("drain.v12", "drain returns at once", role="prefill")
    class DrainReturnsAtOnce(ToyEngine):
        async def drain(self) -> None:
            pass

    @mutant("drain.v12", "drain never returns")
    class DrainNeverReturns(ToyEngine):
        async def drain(self) -> None:
            await asyncio.sleep(10_000)

    @mutant("drain.v12", "drain raises when requests are open")
    class DrainRaises(ToyEngine):
        async def drain(self) -> None:
            if self.open:
                raise RuntimeError("requests are open")

    @mutant("drain.v12", "drain ends the requests instead of waiting for them")
    class DrainEndsRequests(ToyEngine):
        async def drain(self) -> None:
            await self.cleanup()
            self.release_all()
