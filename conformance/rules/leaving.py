"""
The ways in which a request can end, and what an engine still holds afterwards.

    await expect_nothing_left(bench, way, request, place)

Exact with the engine's probe. Without one: what grows with every request that
ended in this way, round after round, and whether the engine still serves.
"""

from __future__ import annotations

import asyncio
import copy
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from hypothesis import strategies as st

from conformance.bench import Bench, Draw
from conformance.reproducer import as_code
from conformance.resources import container_sizes, grown, probe_of, process_sizes
from conformance.runner_errors import NotHere
from conformance.streams import Stream
from conformance.transcript import Transcript, expect
from conformance.wire import prompts, wire_request

WAYS = {
    "whole": "read to its end",
    "stop": "stopped",
    "stop and abort": "stopped and aborted",
    "last step": "stopped in its last step",
    "wrong": "refused",
    "drop": "dropped off the loop",
    "drop while it waits": "dropped while its step was under way",
    "drop and abort": "dropped off the loop and aborted",
    "aclose": "closed with aclose()",
    "cancel": "left with the task of its step cancelled",
    "queued": "aborted while it waited for a slot",
}
ONE_ROUND = 6  # requests
CONFIRM_WITH = 2500  # requests before growth is called a leak: what is cut back now and then is none
_CONFIRM_S = 6.0  # real seconds; fewer requests if they take longer
_SPACING_S = 0.05
_REQUEST_KEY = "['request-"  # in the path of a container: it belongs to one request of this run
_STEP_SHOWS_S = 0.03  # real seconds; a step that waits for anything is seen by then
_confirmed: WeakKeyDictionary[Bench, set[str]] = (
    WeakKeyDictionary()
)  # what grew over many requests once; seen again, few do
_MOST_TOKENS = 4096
MOST_FILLERS = 300


# Requests.


def _block_size(bench: Bench) -> int:
    """Tokens of a KV block, 16 if nobody says; less if two blocks would take half of the context."""
    block = bench.numbers.get("kv_cache_block_size")
    block = block if isinstance(block, int) and block > 0 else 16
    return max(1, min(block, room(bench, 0) // 4))


def room(bench: Bench, prompt: int) -> int:
    """How many tokens fit after such a prompt."""
    context = bench.numbers.get("context_length")
    return max(1, context - prompt) if isinstance(context, int) else 256


def long_request(bench: Bench, draw: Draw, *, num_choices: int | None = None) -> dict[str, Any]:
    """A request whose answer takes longer than a cancelled one may go on, where the context has room for that."""
    block = [11] * _block_size(bench)  # so that at least one KV block is full
    return long_of(bench, draw(prompts(12)) + block * draw(st.integers(1, 2)), num_choices=num_choices)


def long_of(bench: Bench, prompt: list[int], *, num_choices: int | None = None) -> dict[str, Any]:
    wanted = math.ceil(3 * bench.cancel_within_s / max(bench.facts.gap_s, 1e-3)) + 16
    max_tokens = min(wanted, room(bench, len(prompt)), _MOST_TOKENS)
    return wire_request(prompt, max_tokens=max_tokens, stop={"ignore_eos": True}, sampling={"n": num_choices})


def short_of(request: Mapping[str, Any], max_tokens: int) -> dict[str, Any]:
    """The same request with a small budget."""
    short = copy.deepcopy(dict(request))
    short["stop_conditions"]["max_tokens"] = max_tokens
    return short


def gives_one_chunk(bench: Bench) -> bool:
    """Prefill and encode workers answer with one chunk, as a rule."""
    return bench.facts.role in ("prefill", "encode")


def places(bench: Bench) -> st.SearchStrategy[int]:
    """After how many chunks something is done to a stream."""
    return st.just(0) if gives_one_chunk(bench) else st.just(0) | st.integers(0, 5)


async def step_fraction(bench: Bench, fraction: float) -> None:
    """Let that part of a step pass."""
    await bench.let_pass(fraction * max(bench.facts.gap_s, bench.facts.first_chunk_s, 0.001))


async def fill(bench: Bench, engine: Any, within_s: float) -> list[Stream]:
    """Take all of the engine's slots for that long. What is opened next has to wait."""
    limit = bench.numbers.get("max_num_seqs")
    if not isinstance(limit, int):
        raise NotHere("the engine does not say max_num_seqs, so it cannot be filled")
    request = long_of(bench, [3, 5, 8])
    layer_s = request["stop_conditions"]["max_tokens"] * max(bench.facts.gap_s, 1e-4)
    count = limit * math.ceil(within_s / layer_s)
    if gives_one_chunk(bench) or count > (MOST_FILLERS if bench.is_virtual else 64):
        raise NotHere(f"to keep {limit} slots busy for {within_s:g} s takes too many requests")
    fillers = [await bench.open(copy.deepcopy(request), engine=engine) for _ in range(count)]
    for i, stream in enumerate(fillers[:limit]):
        if not await stream.wait_chunks(1, bench.answer_within_s()):
            expect(i > 0, "with nothing else open, a valid request got no answer", stream.transcript)
            break  # the slots may be fewer than max_num_seqs, if the KV cache is small
    return fillers


async def end_all(bench: Bench, streams: list[Stream]) -> None:
    for stream in streams:
        stream.stop()
    for stream in streams:
        await stream.finish(bench.answer_within_s())


# One request, and how it ends.


async def leave(bench: Bench, way: str, request: Mapping[str, Any], place: int, engine: Any = None) -> Transcript:
    """Let one request end in that way; `place` is after how many chunks."""
    engine = bench.engine if engine is None else engine
    short = short_of(request, place + 2)
    within_s = bench.answer_within_s()

    async def opened(request: Mapping[str, Any], **places: Any) -> Stream:
        return await bench.open(request, engine=engine, **places)

    match way:
        case "whole":
            stream = await opened(short)
        case "stop":
            stream = await opened(request, stop_after=place)
        case "stop and abort":
            stream = await opened(request, stop_after=place, aborts=True)
        case "last step":
            whole = await (await opened(short)).finish(within_s)
            stream = await opened(copy.deepcopy(short), stop_after=max(len(whole.chunks) - 1, 0))
        case "wrong":
            stream = await opened({**request, "token_ids": []})
        case "drop":
            stream = await opened(request, driver="bridge", drop_after=place)
        case "drop while it waits":
            stream = await opened(request, driver="bridge")
            if await stream.wait_chunks(place, within_s):
                await step_fraction(bench, 0.4)
                await stream.drop()
        case "drop and abort":
            stream = await opened(request, driver="bridge", drop_after=place)
            await stream.finish(within_s)
            await stream.abort()
        case "aclose":
            stream = await opened(request, driver="plain", drop_after=place)
        case "cancel":
            stream = await opened(request)
            if await stream.wait_chunks(place, within_s):
                end_s = time.monotonic() + max(_STEP_SHOWS_S, 3 * bench.facts.gap_s)
                while not (stream.is_over or stream.is_stepping) and time.monotonic() < end_s:  # noqa: ASYNC110
                    await asyncio.sleep(0)  # a step begins on another thread
                if not stream.cancel_step():
                    stream.stop()  # its chunks are there before they are asked for: no step to cancel
        case "queued":
            fillers = await fill(bench, engine, bench.cancel_within_s + 1)
            stream = await opened(request)
            await bench.let_pass(_SPACING_S)
            await stream.abort()
            await stream.finish(within_s)
            await end_all(bench, fillers)
        case _:
            raise AssertionError(way)
    return await stream.finish(within_s)


# What is left.


async def expect_nothing_left(
    bench: Bench,
    way: str,
    request: Mapping[str, Any],
    place: int,
    *,
    grows: bool = False,
    tell_apart: bool = False,
    in_every_way: bool = False,
) -> None:
    """
    Requests that end in this way leave nothing in the engine on the bench.

    `grows`: look for growth even if there is a probe, which is exact about what it counts. `tell_apart`: each
    request with a prompt of its own, which may stay in a cache. What grows as well when such requests are read to
    their end does not count, but `in_every_way` (without `tell_apart`) it does.
    """
    probe = probe_of(bench.engine)
    transcript = await leave(bench, way, request, place)
    expect_over(bench, transcript, way, place)
    if probe is not None:
        await _expect_probe_clear(bench, probe, way, place, transcript)
    if probe is None or grows:
        await _expect_no_growth(bench, way, request, place, tell_apart=tell_apart, in_every_way=in_every_way)
        await _expect_served(bench, way, request, place)


def expect_over(bench: Bench, transcript: Transcript, way: str, place: int) -> None:
    expect(
        not transcript.is_hung,
        f"a request to be {WAYS[way]} (after {place} chunks) was not over in time, or never came to that point, "
        "after others that had ended",
        transcript,
        code=leave_code(bench, way, transcript.request, place, "0", 300),
    )


async def _expect_probe_clear(bench: Bench, probe: Any, way: str, place: int, transcript: Transcript) -> None:
    left = await settled_probe(bench, probe)
    expect(
        not left,
        f"a request that was {WAYS[way]} (after {place} chunks) is over, and {bench.cancel_within_s:g} s later the "
        f"engine's probe still counts {left}; all of it must be 0",
        transcript,
        code=leave_code(
            bench, way, transcript.request, place, "sum(map(abs, engine.conformance_probe().in_use().values()))", 1
        ),
    )


async def settled_probe(bench: Bench, probe: Any) -> dict[str, int]:
    """What the probe still counts after the deadline for cancelled requests; {} as soon as nothing is left."""

    def left() -> dict[str, int]:
        return {name: value for name, value in probe.in_use().items() if value}

    await _until(bench, lambda: not left())
    return left()


async def _until(bench: Bench, is_done: Callable[[], bool]) -> None:
    """Wait for it, in the loop's time and no longer than a cancelled stream may take."""
    if await bench.let_threads_run(is_done, patience_s=0.02):
        return
    passed_s = 0.0
    while not is_done() and passed_s < bench.cancel_within_s:
        pause_s = max(_SPACING_S, passed_s / 2)
        await bench.let_pass(pause_s)
        passed_s += pause_s


def sizes_of(engine: Any) -> dict[str, int]:
    return {**container_sizes(engine), **process_sizes()}


async def _expect_no_growth(
    bench: Bench, way: str, request: Mapping[str, Any], place: int, *, tell_apart: bool, in_every_way: bool
) -> None:
    last: list[Transcript] = []
    tell_apart = tell_apart and way not in ("whole", "wrong")
    is_compared = way != "whole" and (tell_apart or not in_every_way)

    async def one(this_way: str) -> None:
        mine = copy.deepcopy(dict(request))
        if tell_apart:
            number = int(bench.next_id().rpartition("-")[2])  # another one each time, in the engine's whole life
            mine["token_ids"] = [number % 499 + 1, number // 499 % 499 + 1] * _block_size(bench)
            mine["stop_conditions"]["max_tokens"] = min(
                mine["stop_conditions"]["max_tokens"], room(bench, len(mine["token_ids"]))
            )
        transcript = await leave(bench, this_way, mine, place)
        expect_over(bench, transcript, this_way, place)
        last[:] = [transcript]

    suspects = await growing(
        bench,
        bench.engine,
        lambda: one(way),
        beside=(lambda: one("whole")) if is_compared else None,
        most=30 if way == "queued" else CONFIRM_WITH,
    )
    if not suspects:
        return
    path, (size, count) = max(suspects.items(), key=lambda item: (_REQUEST_KEY not in item[0], item[1]))
    expect(
        False,
        f"after {count} requests that were {WAYS[way]} (after {place} chunks), {_name(path)} has grown by {size}"
        + (", and it does not when such requests are read to their end" if is_compared else "")
        + "; an engine holds nothing for requests that are over",
        *last,
        code=leave_code(bench, way, last[0].request, place, size_code(path), 40, with_ids=tell_apart),
    )


async def growing(
    bench: Bench,
    engine: Any,
    one: Callable[[], Awaitable[None]],
    *,
    beside: Callable[[], Awaitable[None]] | None = None,
    most: int = CONFIRM_WITH,
) -> dict[str, tuple[int, int]]:
    """
    What grows in the engine with every `one()` (and not with every `beside()`): path -> (growth, how many calls).

    Growth counts only when it is about one element or more for each call, in every round, and does not go away
    within the deadline for cancelled requests.
    """
    await one()
    begin = sizes_of(engine)
    suspects: set[str] | None = None
    num_calls, spent_s = 0, 0.0
    confirmed = _confirmed.setdefault(bench, set())
    for is_last in (False, False, True):
        size = ONE_ROUND
        if is_last and suspects is not None:
            if confirmed & suspects:
                break
            size = max(ONE_ROUND, min(most, int(_CONFIRM_S * num_calls / max(spent_s, 1e-6))))
        normal: set[str] = set()
        if beside is not None:
            before, times = sizes_of(engine), min(size, 2 * ONE_ROUND)
            for _ in range(times):
                await beside()
            normal = {path for path, growth in grown(before, sizes_of(engine)).items() if growth > times // 4}
        before, began_s = sizes_of(engine), time.monotonic()
        for _ in range(size):
            await one()
        num_calls, spent_s = num_calls + size, spent_s + time.monotonic() - began_s
        suspects = await _what_stays(bench, engine, before, size, normal, suspects)
        if not suspects:
            return {}
    confirmed.update(suspects or ())
    after = sizes_of(engine)
    return {path: (after.get(path, 0) - begin.get(path, 0), num_calls) for path in sorted(suspects or ())}


async def _what_stays(
    bench: Bench, engine: Any, before: dict[str, int], size: int, normal: set[str], suspects: set[str] | None
) -> set[str]:
    """Which of the suspects (None: of all there is) grew with `size` calls and did not shrink again in time."""
    found: set[str] = set()

    def is_flat() -> bool:
        nonlocal found
        found = {path for path, growth in grown(before, sizes_of(engine)).items() if growth >= 0.75 * size} - normal
        found = found if suspects is None else found & suspects
        return not found

    await _until(bench, is_flat)
    return found


async def _expect_served(bench: Bench, way: str, request: Mapping[str, Any], place: int) -> None:
    transcript = await bench.talk(short_of(request, 2))
    expect(
        transcript.error is None,
        f"after requests that were {WAYS[way]} (after {place} chunks), the engine answers a valid one with "
        f"{type(transcript.error).__name__}: {transcript.error}",
        transcript,
        code=leave_code(bench, way, transcript.request, place, "0", 40),
    )


# Code that shows it.


def _name(path: str) -> str:
    return f"the number of {path}" if " " in path and not path.startswith((".", "[")) else f"engine{path}"


def size_code(path: str) -> str:
    """A Python expression for the size that `sizes_of` gives for that path."""
    if path == "asyncio tasks":
        return "len(asyncio.all_tasks())"
    if path == "threads":
        return "__import__('threading').active_count()"
    if path == "open files":
        return "len(__import__('os').listdir('/proc/self/fd'))"
    if path == "child processes":
        return "len(open(f'/proc/self/task/{__import__(\"os\").getpid()}/children').read().split())"
    thing = f"engine{path.partition(_REQUEST_KEY)[0]}" if path != "." else "engine"
    return f"(lambda held: held.qsize() if hasattr(held, 'qsize') else len(held))({thing})"


def leave_code(
    bench: Bench,
    way: str,
    request: Mapping[str, Any],
    place: int,
    expression: str,
    count: int,
    *,
    with_ids: bool = False,
) -> str:
    """
    Lines for the reproducing script: `count` requests end in this way, and `expression` is what it was before.

    `with_ids`: each with a prompt of its own.
    """
    short = request["stop_conditions"].get("max_tokens") == place + 2 or way in ("whole", "last step")
    budget = {**request, "stop_conditions": {**request["stop_conditions"], "max_tokens": place + 2}}
    sent = as_code(budget if short and way in ("whole", "last step") else request)
    if with_ids:
        sent += " | {'token_ids': [number % 499 + 1, 7] * " + str(_block_size(bench)) + "}"
    reads = {"last step": place + 1}.get(way, 0 if way in ("whole", "wrong") else place)
    lines = [
        "from concurrent.futures import ThreadPoolExecutor",
        "from dynamo._core import Context",
        "off_loop, foreign = asyncio.get_running_loop().run_in_executor, ThreadPoolExecutor(1)",
        "engine, _ = await Engine.from_args(ARGV)",
        "await engine.start(1)",
        "async def leave(number):  # __anext__ is called, and the stream dropped, off the loop, as Dynamo does",
        f"    context, chunk, request = Context(f'r{{number}}'), {{}}, {sent}",
        "    held = [engine.generate(request, context=context)]",
    ]
    read = "await (await off_loop(foreign, held[0].__anext__))"
    if way == "aclose":
        read = "await held[0].__anext__()"
    if reads:
        lines.append(f"    for _ in range({reads}): {read}")
    if way in ("stop", "last step", "stop and abort"):
        lines.append("    context.stop_generating()")
    if way == "stop and abort":
        lines.append("    await engine.abort(Context(f'r{number}'))")
    if way in ("whole", "stop", "last step", "stop and abort"):
        lines.append(f"    while not chunk.get('finish_reason'): chunk = {read}")
    if way == "drop while it waits":
        lines.append(f"    {read}")
    if way == "wrong":
        lines += [f"    try: {read}", "    except Exception as error: print(repr(error))"]
    if way == "cancel":
        lines += [
            "    async def step(): return await held[0].__anext__()",
            "    task = asyncio.ensure_future(step()); await asyncio.sleep(0.001)",
            "    task.cancel(); await asyncio.gather(task, return_exceptions=True); del task",
        ]
    if way == "queued":
        return _queued_code(bench, sent, expression)
    lines.append("    await held.pop().aclose()" if way == "aclose" else "    await off_loop(foreign, held.clear)")
    if way == "drop and abort":
        lines.append("    context.stop_generating(); await engine.abort(Context(f'r{number}'))")
    tolerance = f" + {count // 2}" if count > 1 else ""
    return "\n".join(
        [
            *lines,
            f"before = {expression}",
            f"for number in range({count}): await asyncio.wait_for(leave(number), 10)",
            f"await asyncio.sleep({bench.cancel_within_s:g})",
            f"left = {expression}",
            "await engine.cleanup()",
            f"assert left <= before{tolerance}, f'{{left}} held now, {{before}} before'",
        ]
    )


def _queued_code(bench: Bench, sent: str, expression: str) -> str:
    limit = bench.numbers.get("max_num_seqs")
    return "\n".join(
        [
            "from dynamo._core import Context",
            "engine, _ = await Engine.from_args(ARGV)",
            "await engine.start(1)",
            "async def ask(context):",
            f"    async for chunk in engine.generate({sent}, context=context): pass",
            "for number in range(20):",
            f"    contexts = [Context(f'r{{number}}-{{i}}') for i in range({limit} + 1)]",
            "    asked = []",
            "    for context in contexts:",
            "        asked.append(asyncio.ensure_future(ask(context))); await asyncio.sleep(0.02)",
            "    for context in reversed(contexts):  # the one that waits is aborted first",
            "        context.stop_generating(); await engine.abort(Context(context.id())); await asyncio.sleep(0.02)",
            "    await asyncio.wait_for(asyncio.gather(*asked), 10)",
            f"left = {expression}",
            "await engine.cleanup()",
            "assert left <= 10, left",
        ]
    )
