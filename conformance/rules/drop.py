"""
Rules on streams that nobody reads any more.

Dynamo's bridge never closes a stream: its last reference goes on a thread
without an event loop. Tools and tests close it with `aclose()`. Either way the
engine must hold nothing for it afterwards; see `leaving` for how that is seen.
"""

from __future__ import annotations

import asyncio
import gc
import types
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from conformance.bench import Bench, Draw
from conformance.reproducer import as_code
from conformance.rules import check
from conformance.rules.leaving import (
    WAYS,
    expect_nothing_left,
    expect_over,
    gives_one_chunk,
    leave,
    long_request,
    places,
)
from conformance.transcript import Transcript, expect


@check("drop.aclose", in_process=True)
async def aclose(bench: Bench, draw: Draw) -> None:
    request = long_request(bench, draw)
    place = 1 if gives_one_chunk(bench) else draw(st.integers(1, 6))
    tell_apart = draw(st.booleans())
    await expect_nothing_left(bench, "aclose", request, place, tell_apart=tell_apart)
    for stream_transcript in bench.transcripts:
        closed_of(stream_transcript)


def closed_of(transcript: Transcript) -> None:
    """aclose() itself raised nothing."""
    drops = [i for i, event in enumerate(transcript.events) if event.kind == "drop"]
    errors = [event.value for event in transcript.events[drops[0] :] if event.kind == "error"] if drops else []
    expect(
        not errors,
        f"aclose() raised {type(errors[0]).__name__ if errors else ''}: {errors[0] if errors else ''}; "
        "a stream that is closed does not yield again and raises nothing",
        transcript,
        code=_aclose_code(transcript),
    )


def _aclose_code(transcript: Transcript) -> str:
    return "\n".join(
        [
            "from dynamo._core import Context",
            "engine, _ = await Engine.from_args(ARGV)",
            "await engine.start(1)",
            f"stream = engine.generate({as_code(transcript.request)}, context=Context('r1'))",
            *["await stream.__anext__()"] * min(len(transcript.chunks), 6),
            "await stream.aclose()",
            "await engine.cleanup()",
        ]
    )


@check("drop.foreign_thread", in_process=True, max_examples=20)
async def foreign_thread(bench: Bench, draw: Draw) -> None:
    request = long_request(bench, draw)
    if gives_one_chunk(bench):
        way, place = draw(st.sampled_from([("drop", 1), ("drop while it waits", 0)]))
    else:
        way, place = draw(st.sampled_from(["drop", "drop while it waits", "drop and abort"])), draw(st.integers(1, 5))
    tell_apart, in_debug_mode = draw(st.booleans()), draw(st.booleans())
    loop = asyncio.get_running_loop()
    is_debug = loop.get_debug()
    loop.set_debug(in_debug_mode)  # then the loop raises when it is used from another thread
    try:
        transcript = await leave(bench, way, request, place)
        expect_over(bench, transcript, way, place)
        await bench.let_threads_run(lambda: bool(bench.unraisable), patience_s=0.002)
        unraisable_of(bench.unraisable, transcript, place)
        await expect_nothing_left(bench, way, request, place, tell_apart=tell_apart)
    finally:
        loop.set_debug(is_debug)
    unraisable_of(bench.unraisable, transcript, place)


def unraisable_of(said: list[str], transcript: Transcript, place: int) -> None:
    """The interpreter found nothing wrong when it destroyed the stream."""
    where = "on a thread without an event loop"
    if any("Non-thread-safe" in line for line in said):
        where += ", and the engine then used its event loop from there; loop.call_soon_threadsafe is for that"
    else:
        where += ". No await may be needed for the release, neither in finally nor in except GeneratorExit"
    expect(
        not said,
        f"{said[:1]}: raised when the stream was dropped {where}",
        transcript,
        code=_unraisable_code(transcript, place),
    )


def _unraisable_code(transcript: Transcript, place: int) -> str:
    return "\n".join(
        [
            "import sys",
            "from concurrent.futures import ThreadPoolExecutor",
            "from dynamo._core import Context",
            "off_loop, foreign = asyncio.get_running_loop().run_in_executor, ThreadPoolExecutor(1)",
            "asyncio.get_running_loop().set_debug(True)  # it raises when it is used from another thread",
            "said = []",
            "sys.unraisablehook = lambda unraisable: said.append(repr(unraisable.exc_value))",
            "engine, _ = await Engine.from_args(ARGV)",
            "await engine.start(1)",
            f"held = [engine.generate({as_code(transcript.request)}, context=Context('r1'))]",
            f"for _ in range({max(place, 1)}): await (await off_loop(foreign, held[0].__anext__))",
            "await off_loop(foreign, held.clear)  # the last reference goes on a thread without an event loop",
            "await asyncio.sleep(0.1)",
            "await engine.cleanup()",
            "assert not said, said",
        ]
    )


@check("drop.nested", in_process=True, max_examples=5)
async def nested(bench: Bench, draw: Draw) -> None:
    request = long_request(bench, draw)
    place = 1 if gives_one_chunk(bench) else draw(st.integers(1, 4))
    expect_over(bench, await leave(bench, "drop", request, place), "drop", place)  # what is made once is made now
    before = _open_generators()
    transcript = await leave(bench, "drop", request, place)
    expect_over(bench, transcript, "drop", place)

    def are_closed() -> bool:
        gc.collect()
        return not _open_generators() - before

    if not await bench.let_threads_run(are_closed, patience_s=0.02):
        await bench.let_pass(bench.cancel_within_s)
    gc.collect()
    left = _open_generators() - before
    expect(
        not left,
        f"the stream was dropped after {place} chunks, and {', '.join(sorted(name for _, name in left))} is still open "
        "after garbage collection; what it holds stays held. Close the inner generator with its reader",
        transcript,
        code=_nested_code(transcript, place),
    )


def _open_generators() -> set[tuple[int, str]]:
    """Async generators that have begun, and neither ended nor run now."""
    return {
        (id(thing), thing.__qualname__)
        for thing in gc.get_objects()
        if isinstance(thing, types.AsyncGeneratorType) and thing.ag_frame is not None and not thing.ag_running
    }


def _nested_code(transcript: Transcript, place: int) -> str:
    return "\n".join(
        [
            "import gc, types",
            "from concurrent.futures import ThreadPoolExecutor",
            "from dynamo._core import Context",
            "def num_open():",
            "    gc.collect()",
            "    return sum(isinstance(o, types.AsyncGeneratorType) and bool(o.ag_frame) for o in gc.get_objects())",
            "off_loop, foreign = asyncio.get_running_loop().run_in_executor, ThreadPoolExecutor(1)",
            "engine, _ = await Engine.from_args(ARGV)",
            "await engine.start(1)",
            "async def leave(request_id):",
            f"    held = [engine.generate({as_code(transcript.request)}, context=Context(request_id))]",
            f"    for _ in range({place}): await (await off_loop(foreign, held[0].__anext__))",
            "    await off_loop(foreign, held.clear)",
            "before = num_open()",
            "await asyncio.wait([asyncio.ensure_future(leave(f'r{i}')) for i in range(3)], timeout=5)",
            "await asyncio.sleep(2)",
            "assert (left := num_open()) <= before, f'{left} async generators are open, {before} before the requests'",
        ]
    )


@check("drop.task_cancel", in_process=True)
async def task_cancel(bench: Bench, draw: Draw) -> None:
    request = long_request(bench, draw)
    place = 0 if gives_one_chunk(bench) else draw(st.just(0) | st.integers(0, 4))
    transcript = await leave(bench, "cancel", request, place)
    assume(transcript.of_kind("cancel"))
    task_cancel_of(transcript, place)
    await expect_nothing_left(bench, "cancel", request, place)


def task_cancel_of(transcript: Transcript, place: int) -> None:
    """CancelledError came out, or the stream ended at once."""
    error = transcript.error
    after = transcript.chunks_after("cancel")
    ended_at_once = bool(transcript.terminals) and len(after) <= 1
    expect(
        not transcript.is_hung and (isinstance(error, asyncio.CancelledError) or (error is None and ended_at_once)),
        f"the task of the step after {place} chunks was cancelled; instead of CancelledError "
        + (f"{type(error).__name__} came out: {error}" if error is not None else f"{len(after)} more chunks came"),
        transcript,
        code=_cancel_code(transcript, place),
    )


def _cancel_code(transcript: Transcript, place: int) -> str:
    return "\n".join(
        [
            "from dynamo._core import Context",
            "engine, _ = await Engine.from_args(ARGV)",
            "await engine.start(1)",
            f"stream = engine.generate({as_code(transcript.request)}, context=Context('r1'))",
            f"for _ in range({place}): await stream.__anext__()",
            "async def step(): return await stream.__anext__()",
            "task = asyncio.ensure_future(step())",
            "await asyncio.sleep(0)",
            "task.cancel()",
            "outcome, = await asyncio.gather(task, return_exceptions=True)",
            "await engine.cleanup()",
            "assert isinstance(outcome, asyncio.CancelledError) or 'finish_reason' in outcome, outcome",
        ]
    )


@check("drop.no_state", in_process=True, max_examples=5)
async def no_state(bench: Bench, draw: Draw) -> None:
    possible = [way for way in WAYS if way != "queued" or _can_be_filled(bench)]
    ways = draw(st.permutations(possible))[: None if bench.is_virtual else 3]
    place, request, tell_apart = draw(places(bench)), long_request(bench, draw), draw(st.booleans())
    for way in ways:
        # Before the first read there is nothing to drop.
        here = max(place, 1) if way in ("drop", "drop and abort", "aclose") else place
        await expect_nothing_left(
            bench, way, request, here, grows=bench.is_virtual, tell_apart=tell_apart, in_every_way=True
        )


def _can_be_filled(bench: Bench) -> bool:
    limit: Any = bench.numbers.get("max_num_seqs")
    return isinstance(limit, int) and limit <= (16 if bench.is_virtual else 8) and not gives_one_chunk(bench)
