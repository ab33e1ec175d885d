"""
Rules on requests that are cancelled.

What an engine says to a cancelled request never reaches a Dynamo client, so all of these need the engine in
this process. The checks named `*_of` are pure: they take a transcript and raise.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from conformance import release
from conformance.bench import Bench, Draw
from conformance.reproducer import as_code
from conformance.rules import check
from conformance.rules.leaving import (
    end_all,
    fill,
    gives_one_chunk,
    long_request,
    places,
    short_of,
    step_fraction,
)
from conformance.runner_errors import NotHere
from conformance.transcript import Transcript, expect, tokens_of
from conformance.wire import requests

_STOPS = ("stop", "abort", "kill")
_IS_CANCELLED = "chunks[-1].get('finish_reason') in ('cancelled', 'abort')"


# What a cancelled stream looks like.


def ended_in_time_of(transcript: Transcript, within_s: float, code: str = "") -> None:
    """After the stop the stream ended, and soon. `code` shows it, where the conversation alone does not."""
    kind = next(event.kind for event in transcript.events if event.kind in _STOPS)
    shows = _IS_CANCELLED
    expect(
        not transcript.is_hung,
        f"stopped after {_chunks_before(transcript)} chunks, the stream never ended",
        transcript,
        shows=shows,
        code=code,
    )
    seconds = transcript.seconds_from(kind)
    expect(
        seconds <= within_s,
        f"stopped after {_chunks_before(transcript)} chunks, the stream went on for {seconds:.2f} s; "
        f"a cancelled request ends within {within_s:g} s",
        transcript,
        shows=shows,
        code=code,
    )


def cancelled_of(transcript: Transcript, within_s: float, code: str = "") -> None:
    """It ended in time, as cancelled, and with at most one more chunk of tokens. `code`: see `ended_in_time_of`."""
    num_before = _chunks_before(transcript)
    extra = [
        chunk
        for chunk in transcript.chunks_after(*_STOPS)
        if tokens_of(chunk) and not (isinstance(chunk, Mapping) and chunk.get("finish_reason"))
    ]
    allowed = transcript.request["sampling_options"].get("n") or 1
    expect(
        len(extra) <= allowed,
        f"after the stop {len(extra)} more chunks of tokens came; one for each choice may be on its way, and then the "
        "stream ends",
        transcript,
        shows=f"len([c for c in chunks[{num_before}:] if c['token_ids'] and not c.get('finish_reason')]) <= {allowed}",
        code=code,
    )
    ended_in_time_of(transcript, within_s, code)
    if isinstance(transcript.error, release.exceptions("Cancelled")):
        return
    expect(
        transcript.error is None,
        f"stopped after {num_before} chunks, the stream raised {type(transcript.error).__name__}: {transcript.error}; "
        "it ends with a chunk whose finish_reason is 'cancelled'",
        transcript,
        shows=_IS_CANCELLED,
        code=code,
    )
    expect(
        transcript.is_cancelled,
        f"stopped after {num_before} chunks, the stream ended with finish_reason {transcript.finish_reason!r}; "
        "it is 'cancelled' (or 'abort')",
        transcript,
        shows=_IS_CANCELLED,
        code=code,
    )


def is_complete(bench: Bench, transcript: Transcript) -> bool:
    """The whole answer was there before the stop, or on its way: that is a race, and no answer to the stop."""
    kinds = [event.kind for event in transcript.events]
    if "end" in kinds and "end" not in kinds[min(kinds.index(kind) for kind in _STOPS if kind in kinds) :]:
        return True
    budget = transcript.request["stop_conditions"].get("max_tokens")
    num_choices = transcript.request["sampling_options"].get("n") or 1
    is_whole = gives_one_chunk(bench) or (isinstance(budget, int) and len(transcript.token_ids) >= budget * num_choices)
    came_at_once = len(transcript.chunks_after(*_STOPS)) <= 2 * num_choices  # what is sent, and all that is ready then
    return is_whole and came_at_once and bool(transcript.terminals) and not transcript.is_cancelled


def _chunks_before(transcript: Transcript) -> int:
    return len(transcript.chunks) - len(transcript.chunks_after(*_STOPS))


_MORE_CHOICES = st.sampled_from([False, False, False, True])


async def _choices(bench: Bench, request: dict[str, Any], *, more: bool) -> dict[str, Any]:
    """The request with several choices, if `more` is wanted and the engine gives them."""
    if bench.facts.role not in ("agg", "decode") or not more:
        return request
    several = copy.deepcopy(request)
    several["sampling_options"]["n"] = 2
    first = await bench.talk(short_of(several, 1), reads_on=True)
    return several if first.error is None else request


@check("cancel.pre_first", in_process=True)
async def pre_first(bench: Bench, draw: Draw) -> None:
    request, more = long_request(bench, draw), draw(_MORE_CHOICES)
    transcript = await bench.talk(await _choices(bench, request, more=more), stop_after=0)
    cancelled_of(transcript, bench.cancel_within_s)


@check("cancel.mid", in_process=True)
async def mid(bench: Bench, draw: Draw) -> None:
    request, more, place = long_request(bench, draw), draw(_MORE_CHOICES), draw(st.integers(1, 8))
    request = await _choices(bench, request, more=more)
    transcript = await bench.talk(copy.deepcopy(request), stop_after=place)
    if not transcript.of_kind("stop") and gives_one_chunk(bench):
        raise NotHere(f"a {bench.facts.role} worker answers with one chunk; there is no middle")
    assume(transcript.of_kind("stop"))
    after = transcript.chunks_after("stop")
    assume(after or not transcript.terminals)  # the stop came when all was said
    if len(after) == 1 and transcript.terminals and not transcript.is_cancelled:
        # Perhaps it would have ended there by itself; then this is cancel.race_last's case.
        whole = await bench.talk(copy.deepcopy(request))
        assume(len(whole.chunks) > len(transcript.chunks))
    assume(not is_complete(bench, transcript))
    cancelled_of(transcript, bench.cancel_within_s)


@check("cancel.race_last", in_process=True)
async def race_last(bench: Bench, draw: Draw) -> None:
    request = draw(requests(max_tokens=st.integers(1, 6)))
    fraction = draw(st.sampled_from([None, 0.1, 0.5, 0.9, 1.0]))
    aborts = draw(st.booleans())
    whole = await bench.answer(copy.deepcopy(request))
    last_place = len(whole.chunks) - 1
    if fraction is None:
        stream = await bench.open(request, stop_after=last_place, aborts=aborts, reads_on=True)
    else:
        stream = await bench.open(request, reads_on=True)
        await stream.wait_chunks(last_place, bench.answer_within_s())
        await step_fraction(bench, fraction)
        await (stream.abort() if aborts else bench.let_pass(0))
        if not aborts:
            stream.stop()
    transcript = await stream.finish(bench.answer_within_s())
    assume(transcript.of_kind(*_STOPS))
    race_last_of(transcript, bench.cancel_within_s)


def race_last_of(transcript: Transcript, within_s: float) -> None:
    terminals, num_chunks = transcript.terminals, len(transcript.chunks)
    ended_in_time_of(transcript, within_s)
    if isinstance(transcript.error, release.exceptions("Cancelled")) and not terminals:
        return
    expect(
        transcript.error is None,
        f"stopped while its last token was made, the stream raised {type(transcript.error).__name__}: "
        f"{transcript.error}; it ends as cancelled, or in the natural way",
        transcript,
        shows="chunks[-1].get('finish_reason')",
    )
    expect(
        terminals == [num_chunks - 1],
        f"stopped while its last token was made, the stream has finish_reason on chunks {terminals} of {num_chunks}; "
        "it ends once, as cancelled or in the natural way",
        transcript,
        shows="[i for i, chunk in enumerate(chunks) if chunk.get('finish_reason')] == [len(chunks) - 1]",
        code=_race_code(transcript) if len(terminals) > 1 else "",
    )
    expect(
        transcript.is_cancelled or transcript.finish_reason in ("length", "stop", "eos"),
        f"stopped while its last token was made, the stream ended with {transcript.finish_reason!r}",
        transcript,
        shows="chunks[-1].get('finish_reason') in ('cancelled', 'abort', 'length', 'stop', 'eos')",
    )


def _race_code(transcript: Transcript) -> str:
    return "\n".join(
        [
            "from dynamo._core import Context",
            "engine, _ = await Engine.from_args(ARGV)",
            "await engine.start(1)",
            "context, reasons = Context('r1'), []",
            f"request = {as_code(transcript.request)}",
            f"if {_chunks_before(transcript)} == 0: context.stop_generating()",
            "async for chunk in engine.generate(request, context=context):",
            "    reasons.append(chunk.get('finish_reason'))",
            f"    if len(reasons) == {_chunks_before(transcript)}: context.stop_generating()",
            "await engine.cleanup()",
            "assert [bool(reason) for reason in reasons] == [False] * (len(reasons) - 1) + [True], reasons",
        ]
    )


@check("cancel.blocked", in_process=True, max_examples=12)
async def blocked(bench: Bench, draw: Draw) -> None:
    request = long_request(bench, draw)
    in_queue = draw(st.booleans())
    place = 0 if in_queue or gives_one_chunk(bench) else draw(st.integers(0, 2))
    fraction = draw(st.sampled_from([0.1, 0.5, 0.9]))
    fillers = []
    if in_queue:
        try:
            fillers = await fill(bench, bench.engine, bench.cancel_within_s + 1)
        except NotHere:
            fillers = []
    stream = await bench.open(request)
    await stream.wait_chunks(place, bench.answer_within_s())
    await step_fraction(bench, 4 * fraction if fillers else fraction)
    # On decode the call of abort may wait for the first token; everywhere else it comes with the stop.
    if bench.facts.role == "decode":
        stream.stop()
    else:
        await stream.abort()
    transcript = await stream.finish(bench.answer_within_s())
    beside = len(fillers)
    await end_all(bench, fillers)
    assume(not is_complete(bench, transcript))
    blocked_of(transcript, bench.cancel_within_s, beside, _blocked_code(bench, request, beside))


def blocked_of(transcript: Transcript, within_s: float, num_beside: int, code: str = "") -> None:
    kind = "abort" if transcript.of_kind("abort") else "stop"
    where = f"in the queue behind {num_beside} others" if num_beside else "in the middle of a step"
    was_late = transcript.is_hung or transcript.seconds_from(kind) > within_s
    expect(
        not was_late,
        f"a request that waited {where} was stopped and did not end for "
        f"{transcript.seconds_from(kind):.2f} s; it ends within {within_s:g} s",
        transcript,
        code=code,
    )
    expect(
        transcript.error is None or isinstance(transcript.error, release.exceptions("Cancelled")),
        f"a request that waited {where} was stopped and raised {type(transcript.error).__name__}: {transcript.error}",
        transcript,
        code=code,
    )
    expect(
        transcript.is_cancelled or transcript.error is not None,
        f"a request that waited {where} was stopped and ended with {transcript.finish_reason!r}; it is 'cancelled'",
        transcript,
        code=code,
    )


def _blocked_code(bench: Bench, request: Mapping[str, Any], num_beside: int) -> str:
    abort = [] if bench.facts.role == "decode" else ["await engine.abort(Context('waits'))"]
    return "\n".join(
        [
            "from dynamo._core import Context",
            "engine, _ = await Engine.from_args(ARGV)",
            "await engine.start(1)",
            "async def ask(context):",
            "    reason = None",
            f"    async for chunk in engine.generate({as_code(request)}, context=context):",
            "        reason = chunk.get('finish_reason') or reason",
            "    return reason",
            f"others = [asyncio.ensure_future(ask(Context(f'r{{i}}'))) for i in range({num_beside})]",
            "await asyncio.sleep(0.05)",
            "context = Context('waits')",
            "waiting = asyncio.ensure_future(ask(context))",
            f"await asyncio.sleep({0.05 if num_beside else max(bench.facts.first_chunk_s, 0.001) * 0.5:g})",
            "context.stop_generating()",
            *abort,
            f"reason = await asyncio.wait_for(waiting, {bench.cancel_within_s:g})",
            "await engine.cleanup()",
            "assert reason in ('cancelled', 'abort'), reason",
        ]
    )


@check("cancel.abort_path", in_process=True)
async def abort_path(bench: Bench, draw: Draw) -> None:
    request, more, place = long_request(bench, draw), draw(_MORE_CHOICES), draw(places(bench))
    fraction = draw(st.sampled_from([None, 0.0, 0.3, 0.8]))
    request = await _choices(bench, request, more=more)
    alone = await bench.talk(copy.deepcopy(request), stop_after=place)
    if fraction is None:
        aborted = await bench.talk(copy.deepcopy(request), stop_after=place, aborts=True)
    else:
        stream = await bench.open(copy.deepcopy(request))
        await stream.wait_chunks(place, bench.answer_within_s())
        await step_fraction(bench, fraction)
        await stream.abort()
        aborted = await stream.finish(bench.answer_within_s())
    assume(alone.of_kind("stop") and aborted.of_kind(*_STOPS))
    assume(not is_complete(bench, alone) and not is_complete(bench, aborted))
    abort_path_of(alone, aborted, bench.cancel_within_s)
    after = await bench.talk(short_of(request, 2))
    expect(
        after.error is None,
        f"after a request was aborted (after {place} chunks) the engine answers the next one with "
        f"{type(after.error).__name__}: {after.error}",
        after,
        aborted,
        code=_serves_after_code(aborted, after),
    )


def abort_path_of(alone: Transcript, aborted: Transcript, within_s: float) -> None:
    code = _abort_code(aborted)
    said = f"stopped, the request ends with {_end(alone)}; stopped and aborted, with {_end(aborted)}"
    expect(aborted.error is None or isinstance(aborted.error, type(alone.error)), said, aborted, alone, code=code)
    kind = next(event.kind for event in aborted.events if event.kind in _STOPS)
    seconds = aborted.seconds_from(kind)
    expect(
        not aborted.is_hung and seconds <= within_s,
        f"stopped and aborted, the request went on for {seconds:.2f} s; it ends within {within_s:g} s",
        aborted,
        code=code,
    )
    expect(
        aborted.is_cancelled == alone.is_cancelled and bool(aborted.terminals) == bool(alone.terminals),
        said,
        aborted,
        alone,
        code=code,
    )


def _abort_code(transcript: Transcript) -> str:
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
            f"while len(chunks) < {_chunks_before(transcript)}: await asyncio.sleep(0.001)",
            f"await asyncio.sleep({0.001 if _chunks_before(transcript) else 0})",
            "context.stop_generating()",
            "await engine.abort(Context('r1'))  # a new object, as Dynamo makes one",
            "await asyncio.wait_for(asked, 10)",
            "await engine.cleanup()",
            "assert chunks[-1].get('finish_reason') in ('cancelled', 'abort'), chunks[-1]",
        ]
    )


def _end(transcript: Transcript) -> str:
    if transcript.error is not None:
        return f"{type(transcript.error).__name__}: {transcript.error}"
    return f"finish_reason {transcript.finish_reason!r}" + ("" if not transcript.is_hung else ", not in time")


def _serves_after_code(stopped: Transcript, after: Transcript) -> str:
    """One request is aborted where it was aborted; the next is served."""
    return "\n".join(
        [
            "from dynamo._core import Context",
            "engine, _ = await Engine.from_args(ARGV)",
            "await engine.start(1)",
            "async def ask(context, request, place):",
            "    stream, num_chunks, chunk = engine.generate(request, context=context), 0, {}",
            "    while not chunk.get('finish_reason'):",
            "        if num_chunks == place:",
            "            context.stop_generating(); await engine.abort(Context(context.id()))",
            "        chunk, num_chunks = await stream.__anext__(), num_chunks + 1",
            "    return chunk",
            f"first = ask(Context('r1'), {as_code(stopped.request)}, {_chunks_before(stopped)})",
            "print(await asyncio.gather(asyncio.wait_for(first, 10), return_exceptions=True))",
            f"chunk = await asyncio.wait_for(ask(Context('r2'), {as_code(after.request)}, -1), 10)",
            "await engine.cleanup()",
            "assert chunk['finish_reason'] not in ('cancelled', 'abort'), chunk",
        ]
    )


@check("cancel.usage", in_process=True)
async def usage(bench: Bench, draw: Draw) -> None:
    request, more, place = long_request(bench, draw), draw(_MORE_CHOICES), draw(places(bench))
    transcript = await bench.talk(await _choices(bench, request, more=more), stop_after=place)
    assume(transcript.is_cancelled)
    if transcript.last.get("completion_usage") is None:
        raise NotHere("the cancelled terminal chunk has no completion_usage")
    usage_of(transcript)


def usage_of(transcript: Transcript) -> None:
    said = transcript.last.get("completion_usage")
    num_tokens = len(transcript.token_ids)
    found = said.get("completion_tokens") if isinstance(said, Mapping) else said
    expect(
        found == num_tokens,
        f"the cancelled terminal chunk counts {found!r} completion tokens; {num_tokens} were emitted",
        transcript,
        shows="chunks[-1]['completion_usage']['completion_tokens'] == sum(len(c['token_ids']) for c in chunks)",
    )


@check("cancel.killed", in_process=True)
async def killed(bench: Bench, draw: Draw) -> None:
    request = long_request(bench, draw)
    place = draw(places(bench))
    stream = await bench.open(request)
    if place:
        await stream.wait_chunks(place, bench.answer_within_s())
    stream.kill()
    transcript = await stream.finish(bench.answer_within_s())
    assume(not is_complete(bench, transcript))
    killed_of(transcript, bench.cancel_within_s)


def killed_of(transcript: Transcript, within_s: float) -> None:
    num_before = _chunks_before(transcript)
    in_time = not transcript.is_hung and transcript.seconds_from("kill") <= within_s
    expect(
        in_time and (transcript.is_cancelled or isinstance(transcript.error, release.exceptions("Cancelled"))),
        f"killed after {num_before} chunks (is_killed() and is_stopped() are true), the stream ended with "
        f"{_end(transcript)} after {transcript.seconds_from('kill'):.2f} s; it ends like a stopped one, as 'cancelled' "
        f"within {within_s:g} s",
        transcript,
        code=_killed_code(transcript, num_before),
    )


def _killed_code(transcript: Transcript, num_before: int) -> str:
    return "\n".join(
        [
            "class Killed:  # Dynamo's Python Context has no kill(), but a lost connection kills",
            "    num_chunks, trace_id, span_id, metadata = 0, None, None, None",
            "    def id(self): return 'r1'",
            f"    def is_stopped(self): return self.num_chunks >= {num_before}",
            "    is_killed = is_stopped",
            "    async def async_killed_or_stopped(self):",
            "        while not self.is_stopped(): await asyncio.sleep(0.005)",
            "    def notify_first_token(self): pass",
            "engine, _ = await Engine.from_args(ARGV)",
            "await engine.start(1)",
            "context, chunk = Killed(), {}",
            f"async for chunk in engine.generate({as_code(transcript.request)}, context=context):",
            "    context.num_chunks += 1",
            "await engine.cleanup()",
            "assert chunk.get('finish_reason') in ('cancelled', 'abort'), chunk",
        ]
    )


@check("cancel.after_terminal", in_process=True)
async def after_terminal(bench: Bench, draw: Draw) -> None:
    request = draw(requests(max_tokens=st.integers(1, 4)))
    when = draw(st.sampled_from(["before it is dropped", "at once", "later"]))
    how = draw(st.sampled_from(["stop", "abort", "abort twice"]))
    whole = await bench.answer(copy.deepcopy(request))
    if when == "before it is dropped":
        stream = await bench.open(request, stop_after=len(whole.chunks), aborts=how != "stop")
        await stream.finish(bench.answer_within_s())
    else:
        stream = await bench.open(request)
        await stream.finish(bench.answer_within_s())
        if when == "later":
            await step_fraction(bench, 3.0)
        if how == "stop":
            stream.stop()
        else:
            await stream.abort()
    if how == "abort twice":
        await stream.abort()
    await step_fraction(bench, 1.0)
    code = _late_code(stream.transcript, how)
    after_terminal_of(stream.transcript, when, [_said(record) for record in bench.log_records], code)
    after = await bench.talk(copy.deepcopy(request))
    expect(
        after.error is None and bool(after.terminals) and not after.is_cancelled,
        f"after the {how.split()[0]} of a finished request ({when}), the next request got {_end(after)}",
        after,
        stream.transcript,
        code=code,
    )


def after_terminal_of(transcript: Transcript, when: str, log_lines: list[str], code: str = "") -> None:
    expect(
        transcript.error is None and len(transcript.terminals) == 1,
        f"a stop or abort that came after the terminal chunk ({when}) led to {_end(transcript)}; it does nothing",
        transcript,
        code=code,
    )
    errors = [line for line in log_lines if line.startswith(("ERROR", "CRITICAL"))]
    expect(
        not errors,
        f"a stop or abort that came after the terminal chunk ({when}) is logged as {errors[:2]}; it is nothing special",
        transcript,
        code=code,
    )


def _said(record: logging.LogRecord) -> str:
    return f"{record.levelname} {record.name}: {record.getMessage()}"


def _late_code(transcript: Transcript, how: str) -> str:
    calls = {"stop": [], "abort": [1], "abort twice": [1, 2]}[how]
    return "\n".join(
        [
            "import logging",
            "from dynamo._core import Context",
            "errors = logging.Handler(logging.ERROR)",
            "errors.emit = lambda record: records.append(record.getMessage())",
            "records = []; logging.getLogger().addHandler(errors)",
            "engine, _ = await Engine.from_args(ARGV)",
            "await engine.start(1)",
            "for request_id in ('r1', 'r2'):",
            "    context, reasons = Context(request_id), []",
            f"    async for chunk in engine.generate({as_code(transcript.request)}, context=context):",
            "        reasons.append(chunk.get('finish_reason'))",
            "    print(reasons); assert reasons[-1] in ('length', 'stop', 'eos'), reasons",
            "    context.stop_generating()",
            *("    await engine.abort(Context(request_id))" for _ in calls),
            "    await asyncio.sleep(0.1)",
            "await engine.cleanup()",
            "assert not records, records",
        ]
    )
