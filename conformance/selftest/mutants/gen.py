"""Engines that break the rules on what `generate` yields."""

# ruff: noqa: ARG002  (what is overridden keeps its parameters)

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from conformance.release import backend
from conformance.selftest.mutants import mutant
from conformance.selftest.toy import CONTEXT_LENGTH, ToyEngine, ToyWithChoices, Work, invalid_argument

Chunk = dict[str, Any]


class Rewriting(ToyEngine):
    """The toy engine with another last step: each chunk becomes what `rewrite` makes of it."""

    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[Any, None]:
        async for chunk in ToyEngine.generate(self, request, context):
            for rewritten in self.rewrite(chunk):
                yield rewritten

    def rewrite(self, chunk: Chunk) -> Iterator[Any]:
        yield {**chunk, **self.changes(chunk)}

    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        """What the chunk has instead."""
        return {}


# One stream: its ends.


@mutant("gen.terminal_once", "the last chunk has no finish_reason", seen_in="dynamo#1856, dynamo#10513")
class NoFinishReason(Rewriting):
    def rewrite(self, chunk: Chunk) -> Iterator[Any]:
        yield {key: value for key, value in chunk.items() if key != "finish_reason"}


@mutant("gen.terminal_once", "every chunk has a finish_reason", seen_in="dynamo#4154")
class SeveralFinishReasons(Rewriting):
    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        return {"finish_reason": chunk.get("finish_reason", "stop")}


@mutant("gen.terminal_once", "the terminal chunk comes twice", seen_in="dynamo#4154")
class FinishesTwice(Rewriting):
    def rewrite(self, chunk: Chunk) -> Iterator[Any]:
        yield chunk
        if "finish_reason" in chunk:
            yield {**chunk, "token_ids": []}


@mutant("gen.terminal_once", "usage follows in a chunk after the terminal one")
class UsageAfterTheEnd(Rewriting):
    def rewrite(self, chunk: Chunk) -> Iterator[Any]:
        usage = chunk.pop("completion_usage", None)
        yield chunk
        if usage is not None:
            yield {"token_ids": [], "index": 0, "completion_usage": usage}


@mutant("gen.terminal_once", "None is sent as a keep-alive, in place of a chunk")
class NoneAsKeepAlive(Rewriting):
    def rewrite(self, chunk: Chunk) -> Iterator[Any]:
        yield None
        yield chunk


@mutant("gen.terminal_once", "raises after the terminal chunk")
class RaisesAfterTheEnd(Rewriting):
    def rewrite(self, chunk: Chunk) -> Iterator[Any]:
        yield chunk
        if "finish_reason" in chunk:
            raise RuntimeError("the client is gone")


@mutant("gen.terminal_once", "a cancelled stream ends without a terminal chunk")
class NoTerminalWhenCancelled(Rewriting):
    def rewrite(self, chunk: Chunk) -> Iterator[Any]:
        if chunk.get("finish_reason") != "cancelled":
            yield chunk


@mutant(
    "gen.nonempty",
    "a default of 0 for max_tokens gives an empty stream",
    seen_in="dynamo's sample_engine.py 1.2.1 to 1.6.1",
)
class NothingByDefault(ToyEngine):
    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[Any, None]:
        if (request.get("stop_conditions") or {}).get("max_tokens") is None:
            return
        async for chunk in super().generate(request, context):
            yield chunk


@mutant("gen.nonempty", "an answer of one token is swallowed by a buffer of two")
class NothingForOneToken(ToyEngine):
    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[Any, None]:
        if (request.get("stop_conditions") or {}).get("max_tokens") == 1:
            return
        async for chunk in super().generate(request, context):
            yield chunk


class _Ends(Rewriting):
    """Terminal chunks have another finish_reason."""

    said = ""

    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        return {"finish_reason": self.said} if "finish_reason" in chunk else {}


@mutant("gen.finish_reason", "ends with 'tool_calls'")
class EndsWithToolCalls(_Ends):
    said = "tool_calls"


@mutant("gen.finish_reason", "ends with 'unknown'")
class EndsWithUnknown(_Ends):
    said = "unknown"


@mutant("gen.finish_reason", "ends with 'STOP', the name of an enum's member")
class EndsInCapitals(_Ends):
    said = "STOP"


@mutant("gen.finish_reason", "ends with 'repetition', which only newer clients know")
class EndsWithRepetition(_Ends):
    said = "repetition"


@mutant("gen.finish_reason", "a cancelled stream ends with 'canceled'")
class SpellsCanceled(Rewriting):
    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        return {"finish_reason": "canceled"} if chunk.get("finish_reason") == "cancelled" else {}


@mutant("gen.finish_reason", "chunks before the last have an empty finish_reason")
class EmptyFinishReason(Rewriting):
    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        return {} if "finish_reason" in chunk else {"finish_reason": ""}


# One chunk: its shape.


@dataclass
class _DataChunk:
    token_ids: list[int]
    index: int
    finish_reason: str | None = None


@mutant("gen.chunk_mapping", "chunks are dataclasses")
class ChunksAreDataclasses(Rewriting):
    def rewrite(self, chunk: Chunk) -> Iterator[Any]:
        yield _DataChunk(chunk["token_ids"], chunk["index"], chunk.get("finish_reason"))


@mutant("gen.chunk_mapping", "chunks are lists of token ids")
class ChunksAreLists(Rewriting):
    def rewrite(self, chunk: Chunk) -> Iterator[Any]:
        yield chunk["token_ids"]


@mutant("gen.chunk_mapping", "the last chunk comes as JSON text")
class LastChunkIsText(Rewriting):
    def rewrite(self, chunk: Chunk) -> Iterator[Any]:
        yield json.dumps(chunk) if "finish_reason" in chunk else chunk


@mutant("gen.chunk_mapping", "a terminal chunk without tokens has no token_ids")
class NoTokenIdsAtTheEnd(Rewriting):
    def rewrite(self, chunk: Chunk) -> Iterator[Any]:
        if not chunk["token_ids"]:
            del chunk["token_ids"]
        yield chunk


@mutant("gen.chunk_mapping", "keys that are no strings")
class KeysAreInts(Rewriting):
    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        return {0: "choice"}


@mutant("gen.token_ids", "token_ids is None where there is no token")
class TokenIdsAreNone(Rewriting):
    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        return {} if chunk["token_ids"] else {"token_ids": None}


@mutant("gen.token_ids", "token_ids is an array")
class TokenIdsAreArray(Rewriting):
    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        return {"token_ids": np.asarray(chunk["token_ids"])}


@mutant("gen.token_ids", "token_ids is a generator")
class TokenIdsAreGenerator(Rewriting):
    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        return {"token_ids": (token for token in chunk["token_ids"])}


@mutant("gen.token_ids", "token_ids is one int")
class TokenIdsAreOneInt(Rewriting):
    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        return {"token_ids": chunk["token_ids"][0]} if chunk["token_ids"] else {}


@mutant("gen.token_ids", "token ids are floats")
class TokensAreFloats(Rewriting):
    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        return {"token_ids": [float(token) for token in chunk["token_ids"]]}


@mutant("gen.token_ids", "token ids are text")
class TokensAreText(Rewriting):
    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        return {"token_ids": [str(token) for token in chunk["token_ids"]]}


@mutant("gen.token_ids", "the last token id is -1, for padding")
class TokensArePadded(Rewriting):
    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        return {"token_ids": [*chunk["token_ids"], -1]} if "finish_reason" in chunk else {}


@mutant("gen.token_ids", "a token id of 2^32")
class TokensAreTooLarge(Rewriting):
    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        return {"token_ids": [token + 2**32 for token in chunk["token_ids"]]}


@mutant("gen.index", "the terminal chunk has no index")
class NoIndexAtTheEnd(Rewriting):
    def rewrite(self, chunk: Chunk) -> Iterator[Any]:
        if "finish_reason" in chunk:
            del chunk["index"]
        yield chunk


@mutant("gen.index", "index is '0'")
class IndexIsText(Rewriting):
    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        return {"index": "0"}


@mutant("gen.index", "index is -1 where there is no token")
class IndexIsNegative(Rewriting):
    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        return {} if chunk["token_ids"] else {"index": -1}


@mutant("gen.index", "index is 0.0")
class IndexIsFloat(Rewriting):
    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        return {"index": 0.0}


@mutant("gen.known_keys", "log probabilities under a name of its own")
class OwnNameForLogprobs(Rewriting):
    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        return {"logprobs": [-0.5] * len(chunk["token_ids"])}


@mutant("gen.known_keys", "the terminal chunk has a key of the engine's own")
class OwnKeyAtTheEnd(Rewriting):
    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        return {"cumulative_logprob": -1.5} if "finish_reason" in chunk else {}


@mutant("gen.json_safe", "engine_data has bytes")
class BytesInEngineData(Rewriting):
    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        return {"engine_data": {"trace": b"\x00\x01"}}


@mutant("gen.json_safe", "engine_data has a numpy scalar, deep inside")
class NumpyInEngineData(Rewriting):
    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        return {"engine_data": {"scores": [{"logprob": np.float32(-0.5)}]}} if "finish_reason" in chunk else {}


@mutant("gen.json_safe", "a handle of 2^64 in disaggregated_params", role="prefill")
class HugeHandle(Rewriting):
    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        return {"disaggregated_params": {"address": 2**64}} if "disaggregated_params" in chunk else {}


@mutant("gen.json_safe", "keys of engine_data are token ids")
class TokenIdsAsKeys(Rewriting):
    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        return {"engine_data": dict.fromkeys(chunk["token_ids"], -0.5)}


@mutant("gen.json_safe", "encoder_result is an object of the engine's own", role="encode")
class ObjectAsEncoderResult(Rewriting):
    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        return {"encoder_result": {"embeddings": np.zeros(3)}} if "encoder_result" in chunk else {}


# Tokens and budgets.


@mutant("gen.delta_not_cumulative", "token_ids are all tokens so far", seen_in="dynamo#7752")
class CumulativeTokens(ToyEngine):
    def chunk(self, work: Work, token: int) -> Chunk:
        return {**super().chunk(work, token), "token_ids": list(work.output)}


@mutant("gen.delta_not_cumulative", "the last chunk has the whole answer once more", seen_in="dynamo#7752")
class WholeAnswerAtTheEnd(ToyEngine):
    def ending(self, work: Work, reason: str) -> Chunk:
        return {**super().ending(work, reason), "token_ids": list(work.output)}


@mutant("gen.max_tokens", "one token too many")
class OneTokenTooMany(ToyEngine):
    def budget(self, work: Work) -> int:
        return super().budget(work) + 1


@mutant("gen.max_tokens", "an answer of one token has none", seen_in="dynamo#3443")
class NoTokenForOne(Rewriting):
    def changes(self, chunk: Chunk) -> Mapping[Any, Any]:
        usage = chunk.get("completion_usage", {})
        return {"token_ids": []} if usage.get("completion_tokens") == 1 else {}


@mutant("gen.max_tokens", "'length' one token too soon")
class OneTokenTooFew(ToyEngine):
    def budget(self, work: Work) -> int:
        return max(1, super().budget(work) - 1)


@mutant("gen.max_tokens", "a full answer ends as content_filter")
class FullAnswerIsFiltered(ToyEngine):
    def ending(self, work: Work, reason: str) -> Chunk:
        return super().ending(work, "content_filter" if reason == "length" else reason)


@mutant("gen.max_tokens_zero", "`if max_tokens:` takes 0 for unset", seen_in="dynamo#7503")
class ZeroIsUnset(ToyEngine):
    def max_tokens(self, prompt: Sequence[int], asked: int | None) -> int:
        return super().max_tokens(prompt, asked or None)


@mutant("gen.max_tokens_zero", "0 gives one token")
class ZeroIsOne(ToyEngine):
    def max_tokens(self, prompt: Sequence[int], asked: int | None) -> int:
        return max(1, super().max_tokens(prompt, asked))


@mutant("gen.max_tokens_zero", "0 gives a ZeroDivisionError")
class ZeroDivides(ToyEngine):
    def max_tokens(self, prompt: Sequence[int], asked: int | None) -> int:
        budget = super().max_tokens(prompt, asked)
        return budget if 1 / budget else 0


@mutant("gen.max_tokens_zero", "0 gives an empty stream")
class NothingForZero(ToyEngine):
    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[Any, None]:
        if (request.get("stop_conditions") or {}).get("max_tokens") == 0:
            return
        async for chunk in super().generate(request, context):
            yield chunk


@mutant("gen.default_budget", "without max_tokens the answer is cut at 16", seen_in="dynamo#3876, vllm's default")
class SixteenByDefault(ToyEngine):
    def max_tokens(self, prompt: Sequence[int], asked: int | None) -> int:
        return super().max_tokens(prompt, 16 if asked is None else asked)


@mutant("gen.default_budget", "without max_tokens the answer is cut at 128 of 4096", seen_in="dynamo#8743")
class OneHundredTwentyEightByDefault(ToyEngine):
    def engine_config(self) -> Any:
        config = super().engine_config()
        holder = config.llm if hasattr(backend(), "LlmRegistration") else config
        holder.context_length = 4096
        return config

    def max_tokens(self, prompt: Sequence[int], asked: int | None) -> int:
        return 128 if asked is None else min(asked, 4096 - len(prompt))


@mutant("gen.stop_tokens", "ignore_eos is ignored", seen_in="dynamo#2035")
class IgnoreEosIgnored(ToyEngine):
    def stop_ids(self, request: Mapping[str, Any], stop: Mapping[str, Any]) -> frozenset[int]:
        return super().stop_ids(request, {**stop, "ignore_eos": None})


@mutant("gen.stop_tokens", "min_tokens is ignored")
class MinTokensIgnored(ToyEngine):
    def min_tokens(self, stop: Mapping[str, Any]) -> int:
        return 0


@mutant("gen.stop_tokens", "stop_token_ids are ignored")
class StopIdsIgnored(ToyEngine):
    def stop_ids(self, request: Mapping[str, Any], stop: Mapping[str, Any]) -> frozenset[int]:
        return super().stop_ids(request, {**stop, "stop_token_ids": None})


@mutant("gen.stop_tokens", "hidden stop ids are ignored")
class HiddenStopIdsIgnored(ToyEngine):
    def stop_ids(self, request: Mapping[str, Any], stop: Mapping[str, Any]) -> frozenset[int]:
        return super().stop_ids(request, {**stop, "stop_token_ids_hidden": None})


@mutant("gen.stop_tokens", "the request's EOS ids are ignored")
class EosIdsIgnored(ToyEngine):
    def stop_ids(self, request: Mapping[str, Any], stop: Mapping[str, Any]) -> frozenset[int]:
        return super().stop_ids({**request, "eos_token_ids": None}, stop)


@mutant("gen.stop_tokens", "ends with 'length' at a stop token")
class LengthAtStopToken(ToyEngine):
    def ending(self, work: Work, reason: str) -> Chunk:
        return super().ending(work, "length" if reason == "stop" else reason)


@mutant("gen.n", "n is ignored")
class ChoicesIgnored(ToyEngine):
    def check_choices(self, n: int | None) -> None:
        pass


@mutant("gen.n", "n > 1 gives a NotImplementedError")
class ChoicesNotImplemented(ToyEngine):
    def check_choices(self, n: int | None) -> None:
        if n is not None and n > 1:
            raise NotImplementedError("n > 1")


@mutant("gen.n", "all choices have the index 0")
class ChoicesAllZero(ToyWithChoices):
    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[Any, None]:
        async for chunk in super().generate(request, context):
            yield {**chunk, "index": 0}


@mutant("gen.n", "choices are counted from 1")
class ChoicesFromOne(ToyWithChoices):
    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[Any, None]:
        is_several = ((request.get("sampling_options") or {}).get("n") or 1) > 1
        async for chunk in super().generate(request, context):
            yield {**chunk, "index": chunk["index"] + is_several}


@mutant("gen.context_overflow", "a prompt that is too long crashes", seen_in="dynamo#3780, dynamo#6605")
class LongPromptCrashes(ToyEngine):
    def check_lengths(self, prompt: Sequence[int]) -> None:
        if len(prompt) >= CONTEXT_LENGTH:
            raise RuntimeError("out of memory")
        super().check_lengths(prompt)


@mutant("gen.context_overflow", "a prompt that is too long is cut off")
class LongPromptCutOff(ToyEngine):
    def prompt_of(self, request: Mapping[str, Any]) -> list[int]:
        return super().prompt_of(request)[-CONTEXT_LENGTH + 16 :]


@mutant("gen.context_overflow", "the answer goes on past the end of the context")
class PastTheContext(ToyEngine):
    def max_tokens(self, prompt: Sequence[int], asked: int | None) -> int:
        return super().max_tokens(prompt, None) if asked is None else asked


@mutant("gen.context_overflow", "a prompt that fills the context gets one more token")
class OneTooLong(ToyEngine):
    def check_lengths(self, prompt: Sequence[int]) -> None:
        if len(prompt) != CONTEXT_LENGTH:
            super().check_lengths(prompt)

    def max_tokens(self, prompt: Sequence[int], asked: int | None) -> int:
        return max(1, super().max_tokens(prompt, asked))


@mutant("gen.empty_prompt", "an empty prompt gives an IndexError")
class EmptyPromptCrashes(ToyEngine):
    def check_lengths(self, prompt: Sequence[int]) -> None:
        if prompt[0] < 0:
            raise invalid_argument("a negative token id")
        super().check_lengths(prompt)


@mutant("gen.empty_prompt", "an empty prompt hangs")
class EmptyPromptHangs(ToyEngine):
    def check_lengths(self, prompt: Sequence[int]) -> None:
        if prompt:
            super().check_lengths(prompt)

    async def step(self, work: Work, context: Any) -> None:
        if not work.prompt:
            await asyncio.Event().wait()
        await super().step(work, context)


@mutant("gen.empty_prompt", "an empty prompt gives an empty stream")
class NothingForEmptyPrompt(ToyEngine):
    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[Any, None]:
        if not request["token_ids"]:
            return
        async for chunk in super().generate(request, context):
            yield chunk


# Usage.


@mutant("gen.usage_present", "no usage at all")
class NoUsage(ToyEngine):
    def ending(self, work: Work, reason: str) -> Chunk:
        ending = super().ending(work, reason)
        del ending["completion_usage"]
        return ending


@mutant("gen.usage_present", "no usage when cancelled")
class NoUsageWhenCancelled(ToyEngine):
    def cancelled(self, work: Work) -> Chunk:
        return {"token_ids": [], "index": 0, "finish_reason": "cancelled"}


@mutant("gen.usage_arith", "usage without total_tokens")
class NoTotal(ToyEngine):
    def usage(self, work: Work) -> Chunk:
        usage = super().usage(work)
        del usage["total_tokens"]
        return usage


@mutant("gen.usage_arith", "the total is that of the output only")
class WrongTotal(ToyEngine):
    def usage(self, work: Work) -> Chunk:
        return {**super().usage(work), "total_tokens": len(work.output)}


@mutant("gen.usage_arith", "counts are floats")
class CountsAreFloats(ToyEngine):
    def usage(self, work: Work) -> Chunk:
        return {name: float(count) for name, count in super().usage(work).items()}


@mutant("gen.usage_arith", "a count of -1 for unknown")
class UnknownCount(ToyEngine):
    def usage(self, work: Work) -> Chunk:
        return {**super().usage(work), "completion_tokens": -1}


@mutant("gen.usage_arith", "the prompt is counted without its first token")
class PromptWithoutFirst(ToyEngine):
    def usage(self, work: Work) -> Chunk:
        num_prompt, num_output = len(work.prompt) - 1, len(work.output)
        return {"prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output}


@mutant("gen.usage_arith", "a cancelled answer counts all of max_tokens")
class CancelledCountsAll(ToyEngine):
    def usage(self, work: Work) -> Chunk:
        num_prompt, num_output = len(work.prompt), work.max_tokens
        return {"prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output}


@mutant("gen.usage_single", "each choice has a usage of its own", seen_in="dynamo#12562")
class UsagePerChoice(ToyWithChoices):
    def choice_ending(self, work: Work, reason: str, *, is_last: bool) -> Chunk:
        ending = super().choice_ending(work, reason, is_last=is_last)
        num_prompt, num_output = len(work.prompt), work.max_tokens
        usage = {"prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output}
        return {**ending, "completion_usage": usage}


@mutant("gen.usage_single", "usage of the last choice only", seen_in="dynamo#12562")
class UsageOfLastChoice(ToyWithChoices):
    def choice_ending(self, work: Work, reason: str, *, is_last: bool) -> Chunk:
        ending = super().choice_ending(work, reason, is_last=is_last)
        return {**ending, "completion_usage": {"completion_tokens": work.max_tokens}} if is_last else ending


@mutant("gen.usage_single", "usage on every chunk, of that chunk")
class UsagePerChunk(ToyEngine):
    def chunk(self, work: Work, token: int) -> Chunk:
        usage = {"prompt_tokens": len(work.prompt), "completion_tokens": 1, "total_tokens": len(work.prompt) + 1}
        return {**super().chunk(work, token), "completion_usage": usage}

    def ending(self, work: Work, reason: str) -> Chunk:
        ending = super().ending(work, reason)
        del ending["completion_usage"]
        return ending


# What comes in.


@mutant("gen.wire_request", "an option that is there and None crashes")
class NoneIsCompared(ToyEngine):
    def min_tokens(self, stop: Mapping[str, Any]) -> int:
        return max(int(stop.get("min_tokens", 0)), 0)


@mutant("gen.wire_request", "a negative seed is refused")
class NegativeSeedRefused(ToyEngine):
    def admit(self, request: Mapping[str, Any], context: Any) -> Work:
        seed = (request.get("sampling_options") or {}).get("seed")
        if seed is not None and seed < 0:
            raise invalid_argument("the seed is negative")
        return super().admit(request, context)


@mutant("gen.wire_request", "a temperature is compared with 0.1")
class ExactTemperature(ToyEngine):
    def admit(self, request: Mapping[str, Any], context: Any) -> Work:
        temperature = (request.get("sampling_options") or {}).get("temperature") or 0.0
        if temperature not in (0.0, 0.1, 0.7, 1.0):
            raise invalid_argument(f"no kernel is compiled for temperature {temperature}")
        return super().admit(request, context)


@mutant("gen.wire_request", "an empty model name is refused")
class ModelNameWanted(ToyEngine):
    def admit(self, request: Mapping[str, Any], context: Any) -> Work:
        if not request.get("model", "toy"):
            raise invalid_argument("no model is named")
        return super().admit(request, context)


@mutant("gen.sparse_request", "a request without stop_conditions crashes")
class StopConditionsWanted(ToyEngine):
    def admit(self, request: Mapping[str, Any], context: Any) -> Work:
        return super().admit({**request, "stop_conditions": request["stop_conditions"]}, context)


@mutant("gen.sparse_request", "a request without output_options crashes")
class OutputOptionsWanted(ToyEngine):
    def logprob_options(self, request: Mapping[str, Any]) -> tuple[int | None, int | None]:
        return request["output_options"].get("logprobs"), None


@mutant("gen.sparse_request", "unknown keys are refused")
class UnknownKeysRefused(ToyEngine):
    def admit(self, request: Mapping[str, Any], context: Any) -> Work:
        if unknown := [key for key in request if key.startswith(("zzz_", "new_"))]:
            raise invalid_argument(f"unknown: {unknown}")
        return super().admit(request, context)


@mutant("gen.packed_ids", "packed ids are read byte by byte")
class PackedIdsByteByByte(ToyEngine):
    def prompt_of(self, request: Mapping[str, Any]) -> list[int]:
        return list(request["token_ids"])


@mutant("gen.packed_ids", "packed ids are read as big-endian")
class PackedIdsBigEndian(ToyEngine):
    def prompt_of(self, request: Mapping[str, Any]) -> list[int]:
        ids = request["token_ids"]
        if not isinstance(ids, bytes):
            return list(ids)
        return [int.from_bytes(ids[i : i + 4], "big") for i in range(0, len(ids), 4)]


@mutant("gen.no_mutation", "stop_conditions is popped from the request")
class RequestIsPopped(ToyEngine):
    def admit(self, request: Any, context: Any) -> Work:
        stop = request.pop("stop_conditions", {})
        return super().admit({**request, "stop_conditions": stop}, context)


@mutant("gen.no_mutation", "defaults are written into the request")
class DefaultsAreWritten(ToyEngine):
    def admit(self, request: Any, context: Any) -> Work:
        if request.get("sampling_options"):
            request["sampling_options"]["seed"] = request["sampling_options"].get("seed") or 0
        return super().admit(request, context)


@mutant("gen.no_mutation", "output is appended to the prompt of the request")
class OutputIsAppended(ToyEngine):
    def prompt_of(self, request: Mapping[str, Any]) -> list[int]:
        self.last: Any = request["token_ids"]
        return super().prompt_of(request)

    def chunk(self, work: Work, token: int) -> Chunk:
        if isinstance(self.last, list):
            self.last.append(token)
        return super().chunk(work, token)


# Several streams.


@mutant("gen.concurrent", "requests beyond max_num_seqs are refused")
class TooManyRefused(ToyEngine):
    def admit(self, request: Mapping[str, Any], context: Any) -> Work:
        if self.num_slots_used >= self.options.max_num_seqs:
            raise invalid_argument("too many requests")
        return super().admit(request, context)


@mutant("gen.concurrent", "all requests share one list of output tokens")
class SharedOutput(ToyEngine):
    def admit(self, request: Mapping[str, Any], context: Any) -> Work:
        work = super().admit(request, context)
        others = [other for works in self.open.values() for other in works if other is not work]
        if others:
            work.output = others[0].output
        return work


@mutant("gen.concurrent", "a request that waited for its place is never woken")
class NeverWoken(ToyEngine):
    def give_slot_back(self) -> None:
        self.num_slots_used -= 1


@mutant("gen.concurrent", "requests are cancelled by place, and places move up")
class CancelledByPlace(ToyEngine):
    async def abort(self, context: Any) -> None:
        works = [work for works in self.open.values() for work in works]
        if any(work.request_id == context.id() for work in works):
            works[-1].is_aborted = True


@mutant("gen.isolation", "one cancelled request cancels all")
class AbortsAll(ToyEngine):
    async def abort(self, context: Any) -> None:
        for works in self.open.values():
            for work in works:
                self.abort_work(work)


@mutant("gen.isolation", "after a refused request all answers are other ones")
class RefusalMarks(ToyEngine):
    mark = 0

    def check_lengths(self, prompt: Sequence[int]) -> None:
        self.mark += not prompt
        super().check_lengths(prompt)

    def next_token(self, work: Work) -> int:
        return super().next_token(work) + self.mark


@mutant("gen.isolation", "the answer of a request that left goes to another")
class AnswersMixed(ToyEngine):
    left: list[int]

    def release(self, work: Work) -> None:
        if not work.is_released and len(work.output) < work.max_tokens:
            self.left = list(work.output)
        super().release(work)

    def next_token(self, work: Work) -> int:
        left = getattr(self, "left", [])
        return left.pop() if left and len(work.output) else super().next_token(work)


@mutant("gen.determinism", "tokens are random, whatever the seed")
class RandomTokens(ToyEngine):
    def next_token(self, work: Work) -> int:
        return random.randrange(1000)


@mutant("gen.determinism", "the seed is used, and the number of the request too")
class SeedAndNumber(ToyEngine):
    number = 0

    def admit(self, request: Mapping[str, Any], context: Any) -> Work:
        work = super().admit(request, context)
        self.number += 1
        work.seed += self.number
        return work


_current: ContextVar[Work] = ContextVar("current")
_language: ContextVar[int] = ContextVar("language", default=0)


@mutant("gen.step_per_task", "the request is kept in a ContextVar across a yield")
class RequestInContextVar(ToyEngine):
    async def step(self, work: Work, context: Any) -> None:
        if not work.output:
            _current.set(work)
        await super().step(_current.get(), context)


@mutant("gen.step_per_task", "a ContextVar with a default is set before a yield: other tokens, no error")
class DefaultInContextVar(ToyEngine):
    def admit(self, request: Mapping[str, Any], context: Any) -> Work:
        _language.set(7)
        return super().admit(request, context)

    def next_token(self, work: Work) -> int:
        return super().next_token(work) + _language.get()


@mutant("gen.step_per_task", "generate is no generator function, and asks for the running loop")
class LoopAtTheCall(ToyEngine):
    def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[Any, None]:
        self.asked_on = asyncio.get_running_loop()
        return super().generate(request, context)


@mutant("gen.step_per_task", "a ContextVar is reset after a yield")
class ContextVarIsReset(ToyEngine):
    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[Any, None]:
        async for chunk in super().generate(request, context):
            token = _language.set(7)
            yield chunk
            if "finish_reason" not in chunk:
                _language.reset(token)


@mutant("gen.step_per_task", "asyncio.timeout across a yield: it never ends an answer that takes too long")
class TimeoutAcrossYield(ToyEngine):
    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[Any, None]:
        try:
            async with asyncio.timeout(2.5 * self.options.step_s):
                async for chunk in super().generate(request, context):
                    yield chunk
        except TimeoutError:
            yield {"token_ids": [], "index": 0, "finish_reason": "stop"}


@mutant("gen.step_per_task", "a TaskGroup across a yield: that its task was stopped never arrives")
class TaskGroupAcrossYield(ToyEngine):
    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[Any, None]:
        chunks: asyncio.Queue[Chunk] = asyncio.Queue()

        async def produce() -> None:
            async for chunk in ToyEngine.generate(self, request, context):
                if chunk.get("finish_reason") == "cancelled":
                    raise _Finished(chunk)
                chunks.put_nowait(chunk)

        last: Chunk | None = None
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(produce())
                while last is None:
                    chunk = await chunks.get()
                    yield chunk
                    if "finish_reason" in chunk:
                        return
        except* _Finished as finished:
            last = finished.exceptions[0].args[0]
        if last is not None:
            yield last


class _Finished(Exception):
    """Carries the last chunk."""


@mutant("gen.step_per_task", "a cancel scope that must be left in the task that entered it")
class CancelScopeAcrossYield(ToyEngine):
    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[Any, None]:
        entered = asyncio.current_task()
        async for chunk in super().generate(request, context):
            yield chunk
            if "finish_reason" not in chunk and asyncio.current_task() is not entered:
                raise RuntimeError("Attempted to exit cancel scope in a different task than it was entered in")


@mutant("gen.latency", "time.sleep in the first step")
class SleepsInLoop(ToyEngine):
    async def step(self, work: Work, context: Any) -> None:
        if not work.output:
            time.sleep(0.3)  # noqa: ASYNC251  (that is what is broken)
        await super().step(work, context)


@mutant("gen.latency", "tokenizing takes long, in the event loop")
class BusyInLoop(ToyEngine):
    def prompt_of(self, request: Mapping[str, Any]) -> list[int]:
        end_s = time.perf_counter() + 0.3
        while time.perf_counter() < end_s:
            math.sqrt(2.0)
        return super().prompt_of(request)
