"""
Rules on what `generate` yields.

The checks named `*_of` are pure: they take a transcript and raise.
"""

from __future__ import annotations

import asyncio
import copy
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from conformance import release
from conformance.bench import Bench, Draw
from conformance.reproducer import as_code
from conformance.rules import check
from conformance.rules.machine import concurrent_requests
from conformance.runner_errors import NotHere
from conformance.streams import DriverName, Stream
from conformance.transcript import Transcript, expect, tokens_of
from conformance.wire import as_float32, prompts, requests, sampling_options, seeds, wire_request

MAX_U32 = 2**32 - 1
MAX_U64 = 2**64 - 1
# What LLMEngineOutput in lib/llm (protocols/common/llm_backend.rs) has, 1.2.1 to 1.6.1; anything else vanishes.
KNOWN_KEYS = frozenset(
    {
        "token_ids",
        "tokens",
        "text",
        "cum_log_probs",
        "log_probs",
        "top_logprobs",
        "finish_reason",
        "stop_reason",
        "index",
        "mm_embeddings",
        "disaggregated_params",
        "extra_args",
        "completion_usage",
        "encoder_result",
        "engine_data",
        "worker_trace_link",
    }
)
# Those that Rust takes for any JSON; the others have a type of their own, and numpy's scalars pass for theirs.
OPAQUE_KEYS = frozenset({"disaggregated_params", "encoder_result", "engine_data", "extra_args"})
MANY_TOKENS = 256  # an answer that long was not cut by a library's default of 16 or 128


# One stream: its ends.


@check("gen.terminal_once")
async def terminal_once(bench: Bench, draw: Draw) -> None:
    stop_after = draw(st.none() | st.integers(0, 3))
    terminal_once_of(await bench.talk(draw(requests()), reads_on=True, stop_after=stop_after))


def terminal_once_of(transcript: Transcript) -> None:
    terminals = transcript.terminals
    num_chunks = len(transcript.chunks)
    if transcript.error is not None:
        expect(
            not terminals,
            f"chunk {terminals[:1]} has a finish_reason, and then the stream raised "
            f"{type(transcript.error).__name__}; a stream ends once",
            transcript,
            shows="len(chunks) < 2 or not any(chunk.get('finish_reason') for chunk in chunks)",
        )
        return
    if transcript.was_let_go and not terminals:
        return  # Dynamo did not want to hear the end of a stopped stream
    expect(
        terminals == [num_chunks - 1],
        f"finish_reason is on chunks {terminals} of {num_chunks}; it belongs on the last one and on no other",
        transcript,
        shows="[i for i, chunk in enumerate(chunks) if chunk.get('finish_reason')] == [len(chunks) - 1]",
    )


@check("gen.nonempty")
async def nonempty(bench: Bench, draw: Draw) -> None:
    request = draw(requests(max_tokens=st.sampled_from([1, None, 2, 4])))
    nonempty_of(await bench.talk(request, stop_after=4))


def nonempty_of(transcript: Transcript) -> None:
    expect(
        transcript.chunks or transcript.error is not None,
        "the stream ended without a chunk and without an error",
        transcript,
        shows="len(chunks) > 0",
    )


@check("gen.finish_reason")
async def finish_reason(bench: Bench, draw: Draw) -> None:
    stop_after = draw(st.none() | st.integers(0, 3))
    finish_reason_of(await bench.talk(draw(requests()), stop_after=stop_after))


def finish_reason_of(transcript: Transcript) -> None:
    for chunk in transcript.chunks:
        reason = chunk.get("finish_reason") if isinstance(chunk, Mapping) else None
        expect(
            reason is None or release.is_known_finish_reason(reason),
            f"finish_reason is {reason!r}; ai-dynamo {release.dynamo_version()} takes "
            f"{', '.join(sorted(release.FINISH_REASONS))} and refuses others as the client's error",
            transcript,
            shows=f"all(chunk.get('finish_reason') in {[None, *sorted(release.FINISH_REASONS)]} for chunk in chunks)",
        )


# One chunk: its shape.


@check("gen.chunk_mapping")
async def chunk_mapping(bench: Bench, draw: Draw) -> None:
    chunk_mapping_of(await bench.talk(draw(requests()), stop_after=draw(st.none() | st.integers(0, 3))))


def chunk_mapping_of(transcript: Transcript) -> None:
    for chunk in transcript.chunks:
        expect(
            isinstance(chunk, Mapping),
            f"a chunk is {type(chunk).__name__}; the bridge takes mappings only",
            transcript,
            shows="all(isinstance(chunk, dict) for chunk in chunks)",
        )
        keys = [key for key in chunk if not isinstance(key, str)]
        expect(
            not keys,
            f"a chunk has the keys {keys!r}; keys are str",
            transcript,
            shows="all(isinstance(key, str) for chunk in chunks for key in chunk)",
        )
        expect(
            "token_ids" in chunk,
            f"a chunk has no token_ids, only {sorted(chunk)}; every chunk has it, [] where there is no token",
            transcript,
            shows="all('token_ids' in chunk for chunk in chunks)",
        )


@check("gen.token_ids")
async def token_ids(bench: Bench, draw: Draw) -> None:
    token_ids_of(await bench.talk(draw(requests()), stop_after=draw(st.none() | st.integers(0, 3))))


def token_ids_of(transcript: Transcript) -> None:
    for chunk in transcript.chunks:
        if not isinstance(chunk, Mapping) or "token_ids" not in chunk:
            continue  # gen.chunk_mapping says so
        ids = chunk["token_ids"]
        expect(
            isinstance(ids, Sequence | set | frozenset) and not isinstance(ids, str),
            f"token_ids is {type(ids).__name__}; the bridge takes a list (or another sequence or set) of ints",
            transcript,
            shows="all(isinstance(chunk.get('token_ids'), list | tuple) for chunk in chunks)",
        )
        for token_id in ids:
            expect(
                _is_integer(token_id) and 0 <= int(token_id) <= MAX_U32,
                f"token_ids holds {token_id!r}; token ids are ints from 0 to 2^32 - 1",
                transcript,
                shows="all(hasattr(t, '__index__') and 0 <= t < 2**32 for chunk in chunks for t in chunk['token_ids'])",
            )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) or (hasattr(value, "__index__") and not isinstance(value, float | str | bytes))


@check("gen.index")
async def index(bench: Bench, draw: Draw) -> None:
    index_of(await bench.talk(draw(requests()), stop_after=draw(st.none() | st.integers(0, 3))))


def index_of(transcript: Transcript) -> None:
    for chunk in transcript.chunks:
        if not isinstance(chunk, Mapping):
            continue
        value = chunk.get("index")
        expect(
            _is_integer(value) and not isinstance(value, bool) and 0 <= int(value or 0) <= MAX_U32,
            f"index is {value!r}; every chunk has an int of at least 0, and 0 where there is one choice",
            transcript,
            shows="all(type(chunk.get('index')) is int for chunk in chunks)",
        )


@check("gen.known_keys")
async def known_keys(bench: Bench, draw: Draw) -> None:
    output = draw(st.fixed_dictionaries({}, optional={"logprobs": st.integers(0, 3)}))
    transcript = await bench.talk(draw(requests(output=output)), stop_after=draw(st.none() | st.integers(0, 3)))
    known_keys_of(transcript)


def known_keys_of(transcript: Transcript) -> None:
    for chunk in transcript.chunks:
        unknown = sorted(str(key) for key in set(chunk) - KNOWN_KEYS) if isinstance(chunk, Mapping) else []
        expect(
            not unknown,
            f"a chunk has the keys {unknown}, which nobody reads; known are {', '.join(sorted(KNOWN_KEYS))}",
            transcript,
            shows=f"all(set(chunk) <= set({sorted(KNOWN_KEYS)!r}) for chunk in chunks)",
        )


@check("gen.json_safe")
async def json_safe(bench: Bench, draw: Draw) -> None:
    output = draw(st.fixed_dictionaries({}, optional={"logprobs": st.integers(0, 3), "prompt_logprobs": st.just(1)}))
    json_safe_of(await bench.talk(draw(requests(output=output)), stop_after=draw(st.none() | st.integers(0, 3))))


def json_safe_of(transcript: Transcript) -> None:
    for chunk in transcript.chunks:
        if not isinstance(chunk, Mapping):
            continue
        for key in sorted(OPAQUE_KEYS & set(chunk)):
            problem = not_json_safe(chunk[key])
            expect(
                not problem,
                f"{key} holds {problem}; only None, bool, int below 2^64, float, str, list, dict with str keys cross",
                transcript,
                shows="[__import__('json').dumps(chunk) for chunk in chunks]",
            )


def not_json_safe(value: Any) -> str:
    """What in `value` cannot cross to the Rust side as JSON, or ""."""
    if value is None or isinstance(value, bool | str):
        return ""
    if type(value).__module__.split(".")[0] in ("numpy", "torch"):
        return f"a {type(value).__module__}.{type(value).__name__}"
    if isinstance(value, int):
        return "" if -(2**63) <= value <= MAX_U64 else f"the int {value}"
    if isinstance(value, float):
        return ""
    if isinstance(value, Mapping):
        keys = [key for key in value if not isinstance(key, str)]
        return f"the key {keys[0]!r}" if keys else next(filter(None, map(not_json_safe, value.values())), "")
    if isinstance(value, list | tuple):
        return next(filter(None, map(not_json_safe, value)), "")
    return f"a {type(value).__name__}"


# Tokens and budgets.


@check("gen.delta_not_cumulative")
async def delta_not_cumulative(bench: Bench, draw: Draw) -> None:
    budget = draw(st.integers(3, 12))
    request = draw(requests(max_tokens=st.just(budget)))
    delta_not_cumulative_of(await bench.answer(request), budget)


def delta_not_cumulative_of(transcript: Transcript, budget: int) -> None:
    parts = [tokens for chunk in transcript.chunks if (tokens := tokens_of(chunk))]
    sent: list[int] = []  # what an honest reader of deltas has before each chunk, and what a reader of totals has
    totals: list[int] = []
    repeats = []
    for i, part in enumerate(parts):
        if i > 0 and (part[: len(sent)] == sent or (part[: len(totals)] == totals and len(part) > len(totals))):
            repeats.append(i)
        sent, totals = sent + part, part
    # As deltas they would be more than was asked for; else one token over and over could look like this as well.
    is_too_long = len(sent) > budget
    expect(
        not (is_too_long and len(parts) > 1 and (len(repeats) == len(parts) - 1 or repeats == [len(parts) - 1])),
        f"chunks with {', '.join(str(len(part)) for part in parts)} tokens for max_tokens={budget}, which repeat all "
        "tokens before them; token_ids are the new tokens only",
        transcript,
        shows=f"sum(len(chunk['token_ids']) for chunk in chunks) <= {budget}",
    )


@check("gen.max_tokens")
async def max_tokens(bench: Bench, draw: Draw) -> None:
    budget = draw(st.integers(1, 12))
    # A min_tokens above the budget is a contradiction that no client may send; below it, it says nothing here.
    request = draw(requests(max_tokens=st.just(budget)))
    max_tokens_of(await bench.answer(request), budget)


def max_tokens_of(transcript: Transcript, budget: int) -> None:
    num_tokens = len(transcript.token_ids)
    expect(
        num_tokens <= budget,
        f"{num_tokens} tokens for max_tokens={budget}",
        transcript,
        shows=f"sum(len(chunk['token_ids']) for chunk in chunks) <= {budget}",
    )
    reason = transcript.finish_reason
    expect(
        num_tokens > 0 or reason in ("stop", "eos", "content_filter"),
        f"no token for max_tokens={budget}, and finish_reason {reason!r}",
        transcript,
        shows="sum(len(chunk['token_ids']) for chunk in chunks) > 0",
    )
    if num_tokens < budget:
        expect(
            reason != "length",
            f"finish_reason is 'length' after {num_tokens} tokens of max_tokens={budget}, far from the context's end",
            transcript,
            shows=f"sum(len(chunk['token_ids']) for chunk in chunks) == {budget}",
        )
    else:
        expect(
            reason in ("length", "stop", "eos"),
            f"finish_reason is {reason!r} when max_tokens={budget} is reached; it is 'length'",
            transcript,
            shows="chunks[-1]['finish_reason'] in ('length', 'stop', 'eos')",
        )


@check("gen.max_tokens_zero", max_examples=10)
async def max_tokens_zero(bench: Bench, draw: Draw) -> None:
    transcript = await bench.talk(draw(requests(max_tokens=st.just(0))))
    num_tokens = len(transcript.token_ids)
    expect(
        num_tokens == 0,
        f"{num_tokens} tokens for max_tokens=0, as if it were not set; give none and a terminal, or InvalidArgument",
        transcript,
        shows="sum(len(chunk.get('token_ids', [])) for chunk in chunks) == 0",
    )
    if transcript.error is not None:
        expect(
            isinstance(transcript.error, _client_errors()),
            f"max_tokens=0 raised {type(transcript.error).__name__}; the typed error for it is InvalidArgument",
            transcript,
            shows=_not_raised(transcript),
        )
    else:
        expect(
            transcript.terminals,
            "max_tokens=0 gave a stream without a terminal chunk; finish_reason is 'length' there",
            transcript,
            shows="chunks and chunks[-1].get('finish_reason')",
        )


@check("gen.default_budget", max_examples=6)
async def default_budget(bench: Bench, draw: Draw) -> None:
    context = bench.facts.numbers.get("context_length")
    if not isinstance(context, int):
        raise NotHere("the engine does not say its context_length")
    request = draw(requests(max_isl=8, max_tokens=st.none()))
    request["stop_conditions"]["ignore_eos"] = True
    room = context - len(request["token_ids"])
    enough = min(room - 8, MANY_TOKENS)  # engines differ on whether the last few places can be filled
    if enough < 1:
        raise NotHere(f"context_length is {context}")
    if bench.facts.gap_s * enough > 20 and not bench.is_virtual:
        raise NotHere(f"{enough} tokens would take {bench.facts.gap_s * enough:.0f} s")
    transcript = await bench.talk(request, stop_after=enough, within_s=bench.answer_within_s(enough))
    num_tokens = len(transcript.token_ids)
    reason = transcript.finish_reason
    expect(
        num_tokens >= enough or reason in ("stop", "eos"),
        f"without max_tokens the answer ends after {num_tokens} tokens ({_outcome(transcript)}), though the context "
        f"has room for {room}; a client that sets no limit wants the whole answer",
        transcript,
        shows=f"sum(len(chunk.get('token_ids', [])) for chunk in chunks) >= {enough}",
    )


@check("gen.stop_tokens", max_examples=15)
async def stop_tokens(bench: Bench, draw: Draw) -> None:
    base = draw(requests(max_tokens=st.just(12)))
    base["stop_conditions"] |= {"ignore_eos": None, "min_tokens": draw(st.sampled_from([None, 0]))}
    base["sampling_options"] = {**base["sampling_options"], "temperature": 0.0}
    where = draw(st.integers(0, 11))
    keys = draw(st.permutations(["stop_token_ids", "stop_token_ids_hidden", "eos_token_ids"]))
    tokens = (await bench.answer(base)).token_ids
    again = await bench.answer(copy.deepcopy(base))
    assume(len(tokens) > 1)
    if tokens != again.token_ids:
        raise NotHere("answers to the same greedy request differ, so what it will say cannot be known")
    place = where % len(tokens)
    for key in keys:
        for kind in ("stops", "is too soon", "is ignored"):
            if kind == "is too soon" and place + 3 > len(tokens):
                continue
            if kind == "is ignored" and key != "eos_token_ids":
                continue
            await _stop_token(bench, base, tokens, place, key, kind)


async def _stop_token(
    bench: Bench, base: Mapping[str, Any], tokens: list[int], place: int, key: str, kind: str
) -> None:
    """Ask `base`, whose answer is `tokens`, with the token at `place` as the one to stop at."""
    request = copy.deepcopy(dict(base))
    if kind == "is too soon":
        request["stop_conditions"]["min_tokens"] = place + 3
    if kind == "is ignored":
        request["stop_conditions"]["ignore_eos"] = True
    (request if key == "eos_token_ids" else request["stop_conditions"])[key] = [tokens[place]]
    transcript = await bench.answer(request)
    num_tokens = len(transcript.token_ids)
    first = tokens.index(tokens[place]) + 1
    # The stop token itself may be left out of what is sent. While an end is too soon, an engine may choose other
    # tokens in its place, so that all that follows is another answer; and what ended the first may be ignored too.
    fewest, most = {
        "stops": (first - 1, first),
        "is too soon": (place + 2, 12),
        "is ignored": (len(tokens), 12),
    }[kind]
    options = {name: value for name, value in request["stop_conditions"].items() if value is not None}
    expect(
        fewest <= num_tokens <= most,
        f"with {key}=[{tokens[place]}] and {options}, {num_tokens} tokens came, where {fewest} to {most} were due; "
        f"without it the answer is {tokens}",
        transcript,
        shows=f"{fewest} <= sum(len(chunk['token_ids']) for chunk in chunks) <= {most}",
    )
    if kind == "stops" and first < len(tokens):
        expect(
            transcript.finish_reason in ("stop", "eos"),
            f"finish_reason is {transcript.finish_reason!r} at a stop token; it is 'stop' or 'eos'",
            transcript,
            shows="chunks[-1]['finish_reason'] in ('stop', 'eos')",
        )


@check("gen.n", max_examples=12)
async def n(bench: Bench, draw: Draw) -> None:
    num_choices = draw(st.integers(2, 4))
    request = draw(requests(max_tokens=st.integers(1, 6)))
    request["sampling_options"]["n"] = num_choices
    transcript = await bench.talk(request, reads_on=True)
    if transcript.error is not None:
        expect(
            isinstance(transcript.error, _client_errors()),
            f"n={num_choices} raised {type(transcript.error).__name__}; what an engine does not do is InvalidArgument",
            transcript,
            shows=_not_raised(transcript),
        )
        return
    indices = {chunk.get("index") for chunk in transcript.chunks if isinstance(chunk, Mapping) and tokens_of(chunk)}
    expect(
        indices == set(range(num_choices)),
        f"n={num_choices}, and chunks with tokens have the indices {sorted(indices, key=str)}; "
        "each of 0 .. n-1 is wanted, or InvalidArgument",
        transcript,
        shows=f"{{chunk.get('index') for chunk in chunks if chunk.get('token_ids')}} == set(range({num_choices}))",
    )


@check("gen.context_overflow")
async def context_overflow(bench: Bench, draw: Draw) -> None:
    context = bench.facts.numbers.get("context_length")
    if not isinstance(context, int) or context > 200_000:
        raise NotHere(f"context_length is {context}; prompts around it cannot be made")
    is_slow = not bench.is_virtual and context > 8192  # a prompt that just fits would be computed, again and again
    beyond = st.integers(0, 6) | st.sampled_from([0, 1, context])
    isl = max(1, context + draw(beyond if is_slow else st.integers(-6, 6) | beyond))
    budget = draw(st.integers(1, 12))
    request = wire_request([7] * isl, max_tokens=budget, stop={"ignore_eos": True})
    transcript = await bench.talk(request)
    num_tokens = len(transcript.token_ids)
    if isl > context or (isl == context and num_tokens > 0) or transcript.error is not None:
        expect(
            isinstance(transcript.error, _client_errors()),
            f"a prompt of {isl} tokens, for a context of {context}, gave "
            f"{_outcome(transcript)}; it is the client's mistake: InvalidArgument",
            transcript,
            shows="'InvalidArgument(' in chunks[-1].get('raised', '')"
            if transcript.error is None
            else _not_raised(transcript),
        )
        return
    expect(
        isl + num_tokens <= context,
        f"a prompt of {isl} tokens got {num_tokens} more; together they are beyond the context of {context}",
        transcript,
        shows=f"sum(len(chunk['token_ids']) for chunk in chunks) <= {context - isl}",
    )


@check("gen.empty_prompt", max_examples=8)
async def empty_prompt(bench: Bench, draw: Draw) -> None:
    request = draw(requests())
    request["token_ids"] = []
    transcript = await bench.talk(request)
    if transcript.error is not None:
        expect(
            isinstance(transcript.error, _client_errors()),
            f"an empty prompt raised {_outcome(transcript)}; the typed error for it is InvalidArgument",
            transcript,
            shows=_not_raised(transcript),
        )
    else:
        expect(
            transcript.terminals,
            "an empty prompt gave a stream without a terminal chunk",
            transcript,
            shows="chunks and chunks[-1].get('finish_reason')",
        )
    after = await bench.talk(draw(requests()))
    expect(after.error is None, "after an empty prompt the engine serves nobody any more", transcript, after)


def _outcome(transcript: Transcript) -> str:
    if transcript.error is not None:
        return f"{type(transcript.error).__name__}: {transcript.error}".removesuffix(": ")
    return f"{len(transcript.token_ids)} tokens and finish_reason {transcript.finish_reason!r}"


def _not_raised(transcript: Transcript) -> str:
    return f"not chunks[-1].get('raised', '').startswith('{type(transcript.error).__name__}(')"


def _client_errors() -> tuple[type[BaseException], ...]:
    # The bridge maps ValueError and TypeError to InvalidArgument too; whether that is good is err.typed's question.
    return (*release.exceptions("InvalidArgument"), ValueError, TypeError)


# Usage.


@check("gen.usage_present")
async def usage_present(bench: Bench, draw: Draw) -> None:
    transcript = await bench.answer(draw(requests()), stop_after=draw(st.none() | st.integers(0, 3)))
    expect(
        isinstance(transcript.last.get("completion_usage"), Mapping) or transcript.was_let_go,
        "the terminal chunk has no completion_usage; clients see no token counts",
        transcript,
        shows="isinstance(chunks[-1].get('completion_usage'), dict)",
    )


@check("gen.usage_arith")
async def usage_arith(bench: Bench, draw: Draw) -> None:
    request = draw(requests())
    usage_arith_of(await bench.talk(request, stop_after=draw(st.none() | st.integers(0, 3))))


def usage_arith_of(transcript: Transcript) -> None:
    num_output = 0
    for chunk in transcript.chunks:
        num_output += len(tokens_of(chunk))
        usage = chunk.get("completion_usage") if isinstance(chunk, Mapping) else None
        if usage is None:
            continue
        keys = ("prompt_tokens", "completion_tokens", "total_tokens")
        expect(
            isinstance(usage, Mapping)
            and all(_is_integer(count) and count >= 0 for count in (usage.get(key, -1) for key in keys)),
            f"completion_usage is {usage!r}; it has {', '.join(keys)}, ints of at least 0, or the bridge refuses it",
            transcript,
            shows=f"all(isinstance(c['completion_usage'].get(key), int) and c['completion_usage'][key] >= 0 "
            f"for c in chunks if c.get('completion_usage') for key in {keys})",
        )
        prompt, completion, total = (usage[key] for key in keys)
        num_prompt = len(transcript.request["token_ids"])
        expect(
            (prompt, completion, total) == (num_prompt, num_output, num_prompt + num_output),
            f"completion_usage is {prompt} + {completion} = {total}; {num_prompt} prompt tokens were sent and "
            f"{num_output} tokens came: {num_prompt} + {num_output} = {num_prompt + num_output}",
            transcript,
            shows=f"all(c['completion_usage']['prompt_tokens'] == {num_prompt} and c['completion_usage']"
            "['completion_tokens'] == sum(len(d['token_ids']) for d in chunks) == c['completion_usage']['total_tokens']"
            f" - {num_prompt} for c in chunks if c.get('completion_usage'))",
        )


@check("gen.usage_single", max_examples=20)
async def usage_single(bench: Bench, draw: Draw) -> None:
    request = draw(requests(max_tokens=st.integers(1, 6)))
    request["sampling_options"]["n"] = draw(st.sampled_from([None, 1, 2, 3]))
    transcript = await bench.talk(request, reads_on=True)
    assume(transcript.error is None)
    usage_single_of(transcript)


def usage_single_of(transcript: Transcript) -> None:
    counts = [
        int(chunk["completion_usage"].get("completion_tokens") or 0)
        for chunk in transcript.chunks
        if isinstance(chunk, Mapping) and isinstance(chunk.get("completion_usage"), Mapping)
    ]
    expect(
        counts == sorted(counts),
        f"completion_usage came {len(counts)} times, with {counts} completion tokens; it comes once, or grows",
        transcript,
        shows="(u := [c['completion_usage']['completion_tokens'] for c in chunks if c.get('completion_usage')])"
        " == sorted(u)",
    )
    expect(
        not counts or counts[-1] >= len(transcript.token_ids),
        f"the last completion_usage counts {counts[-1:]} of {len(transcript.token_ids)} tokens: one choice only, "
        "where it is for all choices together",
        transcript,
        shows="chunks[-1]['completion_usage']['completion_tokens'] >= sum(len(chunk['token_ids']) for chunk in chunks)",
    )


# What comes in.


_SEEDS = st.sampled_from([-1, -(2**63), 2**63 - 1]) | seeds()


@check("gen.wire_request")
async def wire_form(bench: Bench, draw: Draw) -> None:
    request = wire_request(
        draw(prompts(24, any_id=True)),
        max_tokens=draw(st.integers(1, 6)),
        sampling={"temperature": as_float32(0.1), **draw(sampling_options()), "seed": draw(_SEEDS)},
    )
    transcript = await bench.talk(request)
    if isinstance(transcript.error, _client_errors()) and max(request["token_ids"]) > 200:  # beyond its vocabulary
        transcript = await bench.talk({**request, "token_ids": [1 + token % 200 for token in request["token_ids"]]})
    expect(
        transcript.error is None and transcript.terminals,
        f"a request as Dynamo writes it (every option key present, None where unset) gave {_outcome(transcript)}",
        transcript,
        shows="chunks[-1].get('finish_reason')",
    )


@check("gen.sparse_request")
async def sparse_request(bench: Bench, draw: Draw) -> None:
    full = wire_request(draw(prompts()), max_tokens=draw(st.integers(1, 6)))
    kept = draw(st.sets(st.sampled_from(sorted(set(full) - {"token_ids", "stop_conditions"}))))
    request: dict[str, Any] = {key: value for key, value in full.items() if key in kept or key == "token_ids"}
    options: dict[str, Any] = {"whole": full["stop_conditions"], "only max_tokens": {"max_tokens": 4}, "empty": {}}
    with_stop = draw(st.sampled_from(["absent", *options]))
    if with_stop != "absent":
        request["stop_conditions"] = options[with_stop]
    request |= draw(st.dictionaries(st.sampled_from(["zzz_unknown", "new_in_some_release"]), st.none() | st.just({})))
    transcript = await bench.talk(request, stop_after=6)
    expect(
        transcript.error is None and (transcript.terminals or transcript.was_let_go),
        f"a request with only {sorted(request)} gave {_outcome(transcript)}; absent groups, unknown keys are normal",
        transcript,
        shows="chunks[-1].get('finish_reason')",
    )


@check("gen.packed_ids")
async def packed_ids(bench: Bench, draw: Draw) -> None:
    ids = draw(prompts())
    budget = draw(st.integers(1, 6))
    plain, again = [await bench.answer(wire_request(ids, max_tokens=budget)) for _ in range(2)]
    as_bytes = b"".join(token.to_bytes(4, "little") for token in ids)
    packed = {**wire_request([], max_tokens=budget), "token_ids": as_bytes}
    transcript = await bench.talk(packed)
    expect(
        transcript.error is None and transcript.terminals,
        f"token_ids packed as {4 * len(ids)} bytes of little-endian int32 gave {_outcome(transcript)}",
        transcript,
        shows="chunks[-1].get('finish_reason')",
    )
    usage, expected = (answer.last.get("completion_usage") for answer in (transcript, plain))
    expect(
        not isinstance(usage, Mapping)
        or not isinstance(expected, Mapping)
        or usage.get("prompt_tokens") == expected.get("prompt_tokens"),
        f"packed, the prompt counts as {usage and usage.get('prompt_tokens')} tokens; it has {len(ids)}",
        transcript,
        shows=f"chunks[-1]['completion_usage']['prompt_tokens'] == {len(ids)}",
    )
    if plain.token_ids == again.token_ids:
        expect(
            transcript.token_ids == plain.token_ids,
            f"packed, the prompt is answered with {transcript.token_ids}, and as a list with {plain.token_ids}",
            transcript,
            shows=_says(plain),
        )


def _says(transcript: Transcript) -> str:
    return f"[token for chunk in chunks for token in chunk.get('token_ids', [])] == {transcript.token_ids}"


@check("gen.no_mutation", in_process=True)
async def no_mutation(bench: Bench, draw: Draw) -> None:
    request = await bench.prepared(draw(requests()))
    before = copy.deepcopy(request)
    transcript = await bench.talk(request, stop_after=draw(st.none() | st.integers(0, 3)), as_is=True)
    if bench.facts.role == "prefill":  # Dynamo's own enforce_prefill_max_tokens does
        for one in (request, before):
            (one.get("stop_conditions") or {}).pop("max_tokens", None)
    changed = sorted(str(key) for key in {*request, *before} if request.get(key, "absent") != before.get(key, "absent"))
    expect(
        not changed,
        f"generate changed {', '.join(changed)} of the request: {request.get(changed[0]) if changed else ''!r}",
        transcript,
        code=_MUTATION_CODE.format(request=as_code(before), stop_after=len(transcript.chunks) or 1),
    )


_MUTATION_CODE = """
import copy
from dynamo._core import Context
engine, _ = await Engine.from_args(ARGV)
await engine.start(1)
request = {request}
before, num_chunks = copy.deepcopy(request), 0
async for chunk in engine.generate(request, context=Context("r1")):
    num_chunks += 1
    if num_chunks == {stop_after}:
        break
await engine.cleanup()
assert request == before, [key for key in {{*request, *before}} if request.get(key) != before.get(key)]
"""


# Several streams.


@check("gen.concurrent", is_machine=True, in_process=True)
def concurrent(bench: Bench) -> Any:
    return concurrent_requests(bench)


_NOISE: dict[str, dict[str, Any]] = {
    "whole": {},
    "stopped": {"stop_after": 1, "aborts": True},
    "dropped": {"drop_after": 1},
    "wrong": {},
}


@check("gen.isolation")
async def isolation(bench: Bench, draw: Draw) -> None:
    request = draw(requests())
    request["sampling_options"] = {**request["sampling_options"], "temperature": 0.0, "seed": 1}
    alone = await bench.answer(copy.deepcopy(request))
    again = await bench.answer(copy.deepcopy(request))
    others: list[tuple[str, dict[str, Any]]] = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["whole", "stopped", "dropped", "wrong"]))
        other = draw(requests(max_tokens=st.integers(2, 12)))
        others.append((kind, {**other, "token_ids": []} if kind == "wrong" else other))
    beside, noise = await _beside(bench, request, others)
    expect(
        beside.error is None and beside.terminals and not beside.is_cancelled,
        f"alone, the request gives {_outcome(alone)}; beside others that fail or leave, {_outcome(beside)}",
        beside,
        *noise,
        shows="chunks[-1].get('finish_reason') not in (None, 'cancelled', 'abort')",
    )
    is_exact = _same(alone, again)
    if is_exact and not bench.is_virtual:
        # On a real device the size of the batch may change the last bits, and so a token.
        calm, _ = await _beside(bench, request, [("whole", other) for kind, other in others if kind != "wrong"])
        is_exact = _same(alone, calm)
    if is_exact:
        expect(
            _same(beside, alone),
            f"alone, the answer is {alone.token_ids} ({alone.finish_reason}); beside others that fail or leave, "
            f"{beside.token_ids} ({beside.finish_reason})",
            beside,
            *noise,
            shows=_says(alone),
        )


async def _beside(
    bench: Bench, request: Mapping[str, Any], others: Sequence[tuple[str, Mapping[str, Any]]]
) -> tuple[Transcript, list[Transcript]]:
    """The answer while others are answered, stopped, dropped or refused; and what those were told."""
    noise = []
    for kind, other in others:
        places: Any = {"stopped": {"stop_after": 1, "aborts": True}, "dropped": {"drop_after": 1}}.get(kind, {})
        noise.append(await bench.open(other, **places))
    beside = await bench.talk(copy.deepcopy(dict(request)))
    return beside, [await stream.finish(bench.answer_within_s()) for stream in noise]


def _same(one: Transcript, other: Transcript) -> bool:
    return one.token_ids == other.token_ids and one.finish_reason == other.finish_reason


@check("gen.determinism")
async def determinism(bench: Bench, draw: Draw) -> None:
    request = draw(requests())
    seed = draw(st.none() | st.integers(0, 2**31))
    request["sampling_options"] |= {"seed": seed, "temperature": 0.0 if seed is None else as_float32(0.7)}
    first, second = [await bench.answer(copy.deepcopy(request)) for _ in range(2)]
    expect(
        first.token_ids == second.token_ids,
        f"the same request (seed {seed}) was answered with {first.token_ids} and then with {second.token_ids}",
        first,
        second,
        shows="[chunk['token_ids'] for chunk in chunks] == [chunk['token_ids'] for chunk in others[0]]",
    )


@check("gen.step_per_task", in_process=True)
async def step_per_task(bench: Bench, draw: Draw) -> None:
    request = draw(requests(max_tokens=st.integers(2, 8)))
    request["sampling_options"] |= {"temperature": 0.0, "seed": 1}
    stop_after = draw(st.none() | st.integers(1, 3))
    request = dict(await bench.prepared(request))

    async def read(driver: DriverName) -> Transcript:
        stream = Stream(driver, bench.engine, copy.deepcopy(request), bench.next_id(), stop_after=stop_after)
        return await stream.finish(bench.answer_within_s())

    plain, transcript = await read("plain"), await read("bridge")
    assume(plain.error is None and not plain.is_hung)  # other rules say so
    why = (
        "no ContextVar, asyncio.timeout, TaskGroup or cancel scope lives across a yield, and generate itself is called "
        "where no event loop runs"
    )
    expect(
        not transcript.is_hung and transcript.error is None and transcript.terminals,
        f"read by one task the stream gave {_outcome(plain)}; with a new task for every step it "
        f"{'never ended' if transcript.is_hung else f'gave {_outcome(transcript)}'}: {why}",
        transcript,
        shows="chunks[-1].get('finish_reason')",
    )
    if stop_after is None and not _same(plain, transcript) and _same(plain, await read("plain")):
        again = await read("bridge")
        expect(
            _same(plain, again),
            f"read by one task the stream gave {_outcome(plain)}, each time; with a new task for every step "
            f"{_outcome(again)}: {why}",
            again,
            shows=_says(plain),
        )


@check("gen.latency", in_process=True, max_examples=5)
async def latency(bench: Bench, draw: Draw) -> None:
    longest_s = await _longest_block_s(bench, [draw(requests()) for _ in range(draw(st.integers(1, 4)))])
    limit_s = 0.25
    expect(
        longest_s < limit_s,
        f"while the engine generated, nothing else on the event loop ran for {longest_s:.2f} s; "
        f"above {limit_s} s the worker's heartbeats and other requests suffer. Use asyncio.to_thread for long work",
        *bench.transcripts,
        code=_LATENCY_CODE.format(request=as_code(bench.transcripts[-1].request), limit_s=limit_s),
    )


_LATENCY_CODE = """
import time
from dynamo._core import Context
engine, _ = await Engine.from_args(ARGV)
await engine.start(1)
gaps = []
async def heartbeat():
    while True:
        began_s = time.perf_counter()
        await asyncio.sleep(0.01)
        gaps.append(time.perf_counter() - began_s)
beating = asyncio.create_task(heartbeat())
await asyncio.sleep(0.05)
chunks = [chunk async for chunk in engine.generate({request}, context=Context("r1"))]
await asyncio.sleep(0.05)
beating.cancel()
await engine.cleanup()
assert max(gaps) < {limit_s}, f"nothing else ran for {{max(gaps):.2f}} s"
"""


async def _longest_block_s(bench: Bench, batch: list[Any]) -> float:
    """Real seconds of the longest callback; the least of up to three tries, since a busy host can be slow too."""
    longest_s = math.inf
    for _ in range(3):
        loop = asyncio.get_running_loop()
        with _CallbackTimes(loop) as times:
            streams = [await bench.open(copy.deepcopy(request)) for request in batch]
            for stream in streams:
                await stream.finish(bench.answer_within_s())
        longest_s = min(longest_s, times.longest_s)
        if longest_s < 0.25:
            break
    return longest_s


class _CallbackTimes:
    """CPU-independent: how long the thread of the loop was inside one callback."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.longest_s = 0.0
        self._loop = loop

    def __enter__(self) -> _CallbackTimes:
        original = self._original = asyncio.events.Handle._run

        def timed(handle: Any) -> Any:
            began_s = time.perf_counter()
            try:
                return original(handle)
            finally:
                self.longest_s = max(self.longest_s, time.perf_counter() - began_s)

        asyncio.events.Handle._run = timed  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.events.Handle._run = self._original  # type: ignore[method-assign]
