"""
Rules on `abort`: best effort, by id, as often as somebody calls it.
"""

from __future__ import annotations

import asyncio
import copy
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from conformance.bench import Bench, Draw
from conformance.context import RequestContext
from conformance.reproducer import as_code
from conformance.resources import probe_of
from conformance.rules import check
from conformance.rules.cancel import cancelled_of, is_complete
from conformance.rules.leaving import (
    expect_nothing_left,
    gives_one_chunk,
    growing,
    leave_code,
    long_request,
    places,
    settled_probe,
    short_of,
    size_code,
    step_fraction,
)
from conformance.runner_errors import NotHere
from conformance.streams import Stream
from conformance.transcript import Transcript, Violation, expect
from conformance.wire import requests

_IDS = st.uuids().map(str) | st.text(max_size=40) | st.sampled_from(["", "0", "request-", "nobody"])


@check("abort.by_id", in_process=True)
async def by_id(bench: Bench, draw: Draw) -> None:
    request = long_request(bench, draw)
    if gives_one_chunk(bench) and not bench.is_virtual:
        raise NotHere(f"a {bench.facts.role} worker answers with one chunk; it cannot be met while it is under way")
    place = 0 if gives_one_chunk(bench) else draw(st.integers(1, 4))
    fraction = draw(st.sampled_from([0.3, 0.6]))
    choices = draw(st.sampled_from([None, None, 2, 3]))
    with_same = await _abort_alone(bench, request, place, fraction, is_fresh=False)
    if not with_same.is_cancelled:
        raise NotHere("abort without a stopped context does not end a request here, so nothing shows how it finds one")
    other = copy.deepcopy(request)
    other["sampling_options"]["n"] = choices
    if choices is not None and (await bench.talk(short_of(other, 1), reads_on=True)).error is not None:
        other["sampling_options"]["n"] = choices = None
    with_fresh = await _abort_alone(bench, other, place, fraction, is_fresh=True)
    by_id_of(with_same, with_fresh, bench.cancel_within_s, choices or 1)


async def _abort_alone(bench: Bench, request: Any, place: int, fraction: float, *, is_fresh: bool) -> Transcript:
    """
    Call abort, without the stop that comes with it: with the request's own context, or another of its id.

    A try in which the whole answer was there before does not count.
    """
    stream = await bench.open(copy.deepcopy(request), reads_on=True)
    await stream.wait_chunks(place, bench.answer_within_s())
    await step_fraction(bench, fraction)
    if not stream.is_over:
        stream.note("abort")
        await bench.engine.abort(RequestContext(stream.context.id()) if is_fresh else stream.context)
    transcript = await stream.finish(bench.answer_within_s())
    assume(transcript.of_kind("abort") and not is_complete(bench, transcript))
    return transcript


def by_id_of(with_same: Transcript, with_fresh: Transcript, within_s: float, num_choices: int = 1) -> None:
    is_late = with_fresh.is_hung or with_fresh.seconds_from("abort") > within_s
    choices = f" (n={num_choices})" if num_choices > 1 else ""
    expect(
        with_fresh.is_cancelled and not is_late,
        "abort with the context that generate got ends a request as cancelled; abort with another context object of "
        f"the same id does not{choices}: it ended with finish_reason {with_fresh.finish_reason!r}, "
        f"{with_fresh.seconds_from('abort'):.2f} s later. Dynamo makes a new object for each abort: go by context.id()",
        with_fresh,
        with_same,
        code=_by_id_code(with_fresh),
    )


def _by_id_code(transcript: Transcript) -> str:
    place = len(transcript.chunks) - len(transcript.chunks_after("abort"))
    return "\n".join(
        [
            "from dynamo._core import Context",
            "engine, _ = await Engine.from_args(ARGV)",
            "await engine.start(1)",
            "chunks, context = [], Context('r1')",
            "async def ask():",
            f"    async for chunk in engine.generate({as_code(transcript.request)}, context=context):",
            "        chunks.append(chunk)",
            "asked = asyncio.ensure_future(ask())",
            f"while len(chunks) < {place} and not asked.done(): await asyncio.sleep(0.001)",
            "await asyncio.sleep(0.001)",
            "await engine.abort(Context('r1'))  # another object, the same id",
            "await asyncio.wait_for(asked, 10)",
            "await engine.cleanup()",
            "assert chunks[-1].get('finish_reason') in ('cancelled', 'abort'), chunks[-1]",
        ]
    )


@check("abort.unknown", in_process=True)
async def unknown(bench: Bench, draw: Draw) -> None:
    request = draw(requests(max_tokens=st.integers(2, 6)))
    request["stop_conditions"]["ignore_eos"] = True
    ids = draw(st.lists(_IDS, min_size=1, max_size=4))
    num_others, place = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    fraction = draw(st.sampled_from([0.0, 0.5]))
    alone = await bench.answer(copy.deepcopy(request))
    ids.append(alone.request_id)
    others: list[Stream] = [await bench.open(copy.deepcopy(request)) for _ in range(num_others)]
    for stream in others[:1]:
        await stream.wait_chunks(place, bench.answer_within_s())
    await step_fraction(bench, fraction)
    opened = [stream.transcript.request_id for stream in others]
    ids += [near for one in opened[:1] for near in (one[:-1], f"{one}0") if near not in opened]
    code = _unknown_code(alone, ids, (opened or ["beside"])[0])
    for request_id in ids:
        await _abort_nobody(bench, request_id, code, [stream.transcript for stream in others])
    beside = [await stream.finish(bench.answer_within_s()) for stream in others]
    for transcript in beside:
        unharmed_of(transcript, alone, ids, code)
    after = await bench.talk(copy.deepcopy(request))
    unharmed_of(after, alone, ids, code)
    probe = probe_of(bench.engine)
    if probe is not None:
        left = await settled_probe(bench, probe)
        expect(not left, f"after abort for the ids {ids}, nothing is open and the probe counts {left}", after)
    await _expect_no_growth_of_nobody(bench, after)


async def _abort_nobody(bench: Bench, request_id: str, code: str, transcripts: list[Transcript]) -> None:
    context = RequestContext(request_id)
    context.stop_generating()
    try:
        async with asyncio.timeout(bench.cancel_within_s):
            await bench.engine.abort(context)
    except Exception as error:
        raise Violation(
            f"abort for the id {request_id!r}, which is not open, raised {type(error).__name__}: {error}; "
            "it may be finished, or on another worker: ignore it",
            transcripts,
            code=code,
        ) from None


def unharmed_of(transcript: Transcript, alone: Transcript, ids: list[str], code: str = "") -> None:
    """A request that nobody stopped ends as it does alone."""
    expect(
        transcript.error is None
        and not transcript.is_hung
        and transcript.finish_reason == alone.finish_reason
        and len(transcript.token_ids) == len(alone.token_ids),
        f"abort was called for the ids {ids}, none of them open; a request of another id then gave "
        f"{transcript.error or transcript.finish_reason!r} after {len(transcript.token_ids)} tokens, where it gives "
        f"{alone.finish_reason!r} after {len(alone.token_ids)} without",
        transcript,
        alone,
        code=code,
    )


def _unknown_code(alone: Transcript, ids: list[str], opened: str) -> str:
    return "\n".join(
        [
            "from dynamo._core import Context",
            "engine, _ = await Engine.from_args(ARGV)",
            "await engine.start(1)",
            "async def ask(request_id):",
            "    reason = None",
            f"    async for chunk in engine.generate({as_code(alone.request)}, context=Context(request_id)):",
            "        reason = chunk.get('finish_reason')",
            "    return reason",
            f"alone = await asyncio.wait_for(ask({alone.request_id!r}), 10)",
            f"beside = asyncio.ensure_future(ask({opened!r}))",
            "await asyncio.sleep(0.001)",
            f"for request_id in {ids!r}:",
            "    await engine.abort(Context(request_id))",
            "reasons = await asyncio.wait_for(beside, 10), await asyncio.wait_for(ask('after'), 10)",
            "await engine.cleanup()",
            "assert reasons == (alone, alone), reasons",
        ]
    )


async def _expect_no_growth_of_nobody(bench: Bench, *transcripts: Transcript) -> None:
    number = 0

    async def one() -> None:
        nonlocal number
        number += 1
        context = RequestContext(f"nobody-{bench.next_id()}")
        context.stop_generating()
        await bench.engine.abort(context)

    suspects = await growing(bench, bench.engine, one)
    for path, (size, count) in suspects.items():
        expect(
            False,
            f"after abort for {count} ids that are not open, engine{path} has grown by {size}; nothing is kept of them",
            *transcripts,
            code="\n".join(
                [
                    "from dynamo._core import Context",
                    "engine, _ = await Engine.from_args(ARGV)",
                    "await engine.start(1)",
                    f"before = {size_code(path)}",
                    "for i in range(200): await engine.abort(Context(f'nobody-{i}'))",
                    f"left = {size_code(path)}",
                    "await engine.cleanup()",
                    "assert left <= before + 100, f'{left} held now, {before} before'",
                ]
            ),
        )


@check("abort.twice", in_process=True)
async def twice(bench: Bench, draw: Draw) -> None:
    request, place, fraction = long_request(bench, draw), draw(places(bench)), draw(st.sampled_from([0.0, 0.5]))
    at_once, times, pause = draw(st.booleans()), draw(st.integers(2, 3)), draw(st.sampled_from([0.0, 1.0]))
    stream = await bench.open(request)
    await stream.wait_chunks(place, bench.answer_within_s())
    await step_fraction(bench, fraction)
    assume(not stream.is_over)
    if at_once:
        await asyncio.gather(*(stream.abort() for _ in range(times)))
    else:
        for i in range(times):
            await stream.abort()
            if i == 0:
                await step_fraction(bench, pause)
    transcript = await stream.finish(bench.answer_within_s())
    assume(not is_complete(bench, transcript))
    twice_of(transcript, bench.cancel_within_s, times, at_once=at_once)
    probe = probe_of(bench.engine)
    if probe is not None:
        left = await settled_probe(bench, probe)
        expect(
            not left,
            f"after {times} aborts of one request the probe counts {left}; it must count 0, and give back once",
            transcript,
            code=_twice_code(
                transcript,
                at_once=at_once,
                then="not any(engine.conformance_probe().in_use().values()), engine.conformance_probe().in_use()",
            ),
        )


def twice_of(transcript: Transcript, within_s: float, times: int, *, at_once: bool) -> None:
    how = "at the same time" if at_once else "one after the other"
    error = transcript.error
    code = _twice_code(transcript, at_once=at_once)
    expect(
        error is None or not transcript.is_cancelled,
        f"abort was called {times} times for one request, {how}, and raised {type(error).__name__}: {error}",
        transcript,
        code=code,
    )
    cancelled_of(transcript, within_s, code)


def _twice_code(transcript: Transcript, *, at_once: bool, then: str = "") -> str:
    calls = (
        ["await asyncio.gather(*(engine.abort(Context('r1')) for _ in range(3)))"]
        if at_once
        else ["for _ in range(3): await engine.abort(Context('r1'))"]
    )
    return "\n".join(
        [
            "from dynamo._core import Context",
            "engine, _ = await Engine.from_args(ARGV)",
            "await engine.start(1)",
            "chunks, context = [], Context('r1')",
            "async def ask():",
            f"    async for chunk in engine.generate({as_code(transcript.request)}, context=context):",
            "        chunks.append(chunk)",
            "asked = asyncio.ensure_future(ask())",
            "await asyncio.sleep(0.001)",
            "context.stop_generating()",
            *calls,
            "await asyncio.wait_for(asked, 10)",
            "await engine.abort(Context('r1'))",
            *([f"assert {then}"] if then else []),
            "await engine.cleanup()",
            "assert chunks[-1].get('finish_reason') in ('cancelled', 'abort'), chunks[-1]",
        ]
    )


@check("abort.decode_defer", in_process=True)
async def decode_defer(bench: Bench, draw: Draw) -> None:
    request = long_request(bench, draw)
    way = draw(st.sampled_from(["drop while it waits", "drop and abort"]))
    fraction, stops, pause = draw(st.sampled_from([0.0, 0.5])), draw(st.booleans()), draw(st.sampled_from([0.0, 2.0]))
    if way == "drop while it waits":
        await expect_nothing_left(bench, way, request, 0)
        return
    stream = await bench.open(request)
    await step_fraction(bench, fraction)
    if stops:
        stream.stop()
    await stream.drop()
    await stream.finish(bench.answer_within_s())
    await step_fraction(bench, pause)
    await stream.abort()  # the late one
    transcript = stream.transcript
    expect(
        transcript.error is None,
        f"the late abort of a request that was dropped before its first token raised {transcript.error!r}",
        transcript,
        code=leave_code(bench, "drop and abort", transcript.request, 1, "0", 1),
    )
    await expect_nothing_left(bench, "drop and abort", request, 1)
