"""Broken prefill and decode workers, and engines with several ranks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from conformance.selftest.mutants import mutant
from conformance.selftest.toy import ToyEngine, Work, invalid_argument


@mutant("disagg.prefill_one", "a prefill worker answers in full", role="prefill")
class PrefillAnswers(ToyEngine):
    def max_tokens(self, prompt: Sequence[int], asked: int | None) -> int:
        return min(asked or 16, 96 - len(prompt))


@mutant("disagg.prefill_one", "min_tokens is kept, and contradicts one token", role="prefill")
class PrefillKeepsMinTokens(ToyEngine):
    def min_tokens(self, stop: Mapping[str, Any]) -> int:
        if (stop.get("min_tokens") or 0) > 1:
            raise ValueError("min_tokens must be at most max_tokens")
        return 0


@mutant("disagg.prefill_params", "no disaggregated_params", role="prefill")
class PrefillWithoutParams(ToyEngine):
    def ending(self, work: Work, reason: str) -> dict[str, Any]:
        ending = super().ending(work, reason)
        ending.pop("disaggregated_params", None)
        return ending


@mutant("disagg.prefill_params", "the params hold bytes", role="prefill")
class PrefillParamsBytes(ToyEngine):
    def ending(self, work: Work, reason: str) -> dict[str, Any]:
        ending = super().ending(work, reason)
        if "disaggregated_params" in ending:
            ending["disaggregated_params"]["opaque_state"] = b"\x00\x01"
        return ending


@mutant("disagg.prefill_params", "the params are a list", role="prefill")
class PrefillParamsList(ToyEngine):
    def ending(self, work: Work, reason: str) -> dict[str, Any]:
        ending = super().ending(work, reason)
        if "disaggregated_params" in ending:
            ending["disaggregated_params"] = list(ending["disaggregated_params"].items())
        return ending


@mutant("disagg.handoff", "decode reads a key that prefill does not write", role="decode")
@mutant("disagg.handoff", "prefill does not write a key that decode reads", role="prefill")
class HandoffWithAnotherKey(ToyEngine):
    def check_handover(self, request: Mapping[str, Any]) -> None:
        super().check_handover(request)
        if self.role == "decode" and request.get("_HEALTH_CHECK") is not True:
            request["prefill_result"]["disaggregated_params"]["kv_transfer_params"]


@mutant("disagg.handoff", "decode gives no token when prefill gave the first", role="decode")
class DecodeEndsAtOnce(ToyEngine):
    def max_tokens(self, prompt: Sequence[int], asked: int | None) -> int:
        return 0 if self.role == "decode" else super().max_tokens(prompt, asked)


@mutant("disagg.decode_requires", "decode starts over without prefill_result", role="decode")
class DecodeStartsOver(ToyEngine):
    def check_handover(self, request: Mapping[str, Any]) -> None:
        del request


@mutant("disagg.decode_requires", "decode waits for a transfer that never comes", role="decode")
class DecodeWaitsForever(ToyEngine):
    def check_handover(self, request: Mapping[str, Any]) -> None:
        del request

    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
        if self.role == "decode" and not request.get("prefill_result"):
            while not context.is_stopped():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        async for chunk in super().generate(request, context):
            yield chunk


@mutant("disagg.decode_requires", "decode ends as if all were well", role="decode")
class DecodeEndsQuietly(ToyEngine):
    def check_handover(self, request: Mapping[str, Any]) -> None:
        del request

    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
        if self.role == "decode" and not request.get("prefill_result"):
            yield {"token_ids": [], "index": 0, "finish_reason": "stop"}
            return
        async for chunk in super().generate(request, context):
            yield chunk


@mutant("disagg.probe_bypass", "decode rejects the probe", seen_in="dynamo#8521", role="decode")
class DecodeRejectsProbe(ToyEngine):
    def check_handover(self, request: Mapping[str, Any]) -> None:
        if self.role == "decode" and not isinstance(request.get("prefill_result"), dict):
            raise invalid_argument("a decode worker needs prefill_result")


@mutant("disagg.probe_bypass", "the probe sees a chunk before the engine runs", seen_in="dynamo#8611", role="prefill")
class ProbeSeesSyntheticChunk(ToyEngine):
    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
        if self.role == "prefill":
            yield {"token_ids": [], "index": 0, "disaggregated_params": {"bootstrap_room": 7}}
        async for chunk in super().generate(request, context):
            yield chunk


@mutant("disagg.dp_rank", "a rank out of range raises IndexError", engine_args="--data-parallel-size 2")
class RankOutOfRange(ToyEngine):
    def rank_of(self, request: Mapping[str, Any]) -> int:
        return int((request.get("routing") or {}).get("dp_rank") or 0)


@mutant("disagg.dp_rank", "a rank out of range is refused", engine_args="--data-parallel-size 2")
class RankRefused(ToyEngine):
    def rank_of(self, request: Mapping[str, Any]) -> int:
        rank = (request.get("routing") or {}).get("dp_rank")
        if rank is not None and rank >= 2:
            raise invalid_argument(f"no rank {rank}")
        return super().rank_of(request)
