"""
Rules on what happens between the last request and `cleanup`: `drain` in 1.2, `is_quiescent` from 1.3 on.
"""

from __future__ import annotations

import asyncio
import copy
from typing import Any

from hypothesis import strategies as st

from conformance.bench import Bench, Draw
from conformance.release import backend, dynamo_version
from conformance.reproducer import as_code
from conformance.resources import probe_of
from conformance.rules import check
from conformance.rules.leaving import gives_one_chunk, long_request, short_of, step_fraction
from conformance.runner_errors import NotHere
from conformance.streams import Stream
from conformance.transcript import Violation, expect

CHEAP_S = 0.5  # the worker polls several times a second


@check("drain.v12", needs_engine=False, max_examples=10)
async def v12(bench: Bench, draw: Draw) -> None:
    if getattr(bench.engine_class, "drain", None) is getattr(backend().LLMEngine, "drain", None):
        raise NotHere("drain is not overridden")
    request = short_of(long_request(bench, draw), draw(st.integers(2, 8)))
    count, fraction = draw(st.integers(0, 3)), draw(st.sampled_from([0.0, 0.5]))
    engine = await bench.make_started()
    streams = [await bench.open(copy.deepcopy(request), engine=engine) for _ in range(count)]
    await step_fraction(bench, fraction)
    was_open = [stream for stream in streams if not stream.is_over]
    code = _drain_code(streams[0].transcript.request if streams else request, count, gives_one_chunk(bench))
    try:
        async with asyncio.timeout(bench.answer_within_s()):
            await engine.drain()
    except TimeoutError:
        raise Violation(
            f"drain() with {len(was_open)} short requests in flight has not ended after {bench.answer_within_s():g} s",
            [stream.transcript for stream in streams],
            code=code,
        ) from None
    except Exception as error:
        raise Violation(
            f"drain() with {len(was_open)} requests in flight raised {type(error).__name__}: {error}",
            [stream.transcript for stream in streams],
            code=code,
        ) from None
    if gives_one_chunk(bench):  # the KV of a prefill is still to be fetched; the others may leave it to cleanup
        await bench.let_threads_run(lambda: all(stream.is_over for stream in was_open), patience_s=0.2)
        expect(
            all(stream.is_over for stream in was_open),
            f"drain() returned while {sum(not stream.is_over for stream in was_open)} requests were in flight; cleanup "
            "comes next and frees what they use",
            *(stream.transcript for stream in was_open),
            code=code,
        )
    for stream in streams:
        transcript = await stream.finish(bench.answer_within_s())
        expect(
            transcript.error is None and not transcript.is_hung and bool(transcript.terminals),
            "a request that was in flight when drain() was called did not end in the usual way; drain waits for it",
            transcript,
            code=code,
        )


def _drain_code(request: Any, count: int, must_wait: bool) -> str:
    return "\n".join(
        [
            "from dynamo._core import Context",
            "engine, _ = await Engine.from_args(ARGV)",
            "await engine.start(1)",
            "async def ask(request_id):",
            f"    async for chunk in engine.generate({as_code(request)}, context=Context(request_id)): pass",
            "    return chunk",
            f"asked = [asyncio.ensure_future(ask(f'r{{i}}')) for i in range({count})]",
            "await asyncio.sleep(0.001)",
            "await asyncio.wait_for(engine.drain(), 60)",
            "await asyncio.sleep(0)",
            *(["assert all(one.done() for one in asked), 'returned too soon'"] if must_wait else []),
            "chunks = await asyncio.gather(*asked)",
            "await engine.cleanup()",
            "assert all(chunk.get('finish_reason') for chunk in chunks), chunks",
        ]
    )


@check("drain.dead_code", needs_engine=False, max_examples=1)
async def dead_code(bench: Bench, draw: Draw) -> None:
    del draw
    if hasattr(backend().LLMEngine, "drain"):
        raise NotHere(f"ai-dynamo {dynamo_version()} has drain()")
    engine = await bench.make()
    expect(
        not callable(getattr(engine, "drain", None)),
        f"{type(engine).__name__} defines drain(), which ai-dynamo {dynamo_version()} never calls; "
        "from 1.3 on a prefill worker is asked is_quiescent(), and the rest belongs into cleanup()",
        code="engine, _ = await Engine.from_args(ARGV)\nassert not hasattr(engine, 'drain'), 'nobody calls it'",
    )


@check("drain.is_quiescent", in_process=True)
async def is_quiescent(bench: Bench, draw: Draw) -> None:
    request, count = long_request(bench, draw), draw(st.integers(1, 3))
    ways: list[dict[str, int]] = draw(st.lists(st.sampled_from([{}, {"stop_after": 0}, {"drop_after": 1}]), min_size=3))
    pauses = draw(st.lists(st.sampled_from([0.0, 0.3, 1.0, 1.4]), min_size=1, max_size=3))
    await _ask(bench, "before any request")
    streams: list[Stream] = []
    for way in ways[:count]:
        streams.append(await bench.open(copy.deepcopy(request), **way))  # type: ignore[arg-type]
        for pause in pauses:
            await step_fraction(bench, pause)
            await _ask(bench, "with requests under way")
    for stream in streams:
        transcript = await stream.finish(bench.answer_within_s())
        expect(
            transcript.error is None and (not stream.transcript.is_hung),
            "while is_quiescent was polled, a valid request did not end in the usual way; asking changes nothing",
            transcript,
        )
    loop = asyncio.get_running_loop()
    end_s = loop.time() + bench.answer_within_s()
    answer = await _ask(bench, "after all requests")
    while answer is False and loop.time() < end_s:
        await bench.let_pass(0.1 if bench.is_virtual else 0.02)
        answer = await _ask(bench, "after all requests")
    expect(
        answer is not False,
        f"{bench.answer_within_s():g} s after the last request has ended, is_quiescent still gives False; "
        "the worker waits for its whole budget",
        *(stream.transcript for stream in streams),
        code=_quiescent_code(streams[0], "assert answers[-1] is not False, answers"),
    )
    if answer is True:
        again = [await _ask(bench, "after all requests") for _ in range(3)]
        expect(
            again == [True] * 3,
            f"with no request open, is_quiescent gave True and then {again}; nothing happened in between",
            *(stream.transcript for stream in streams),
            code=_quiescent_code(streams[0], "assert answers[-1] is True, answers"),
        )


async def _ask(bench: Bench, when: str) -> Any:
    probe = probe_of(bench.engine)
    before = _transfers(probe)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    try:
        async with asyncio.timeout(bench.answer_within_s()):
            answer = await bench.engine.is_quiescent()
    except TimeoutError:
        raise Violation(f"is_quiescent {when} does not return", bench.transcripts) from None
    except Exception as error:
        raise Violation(
            f"is_quiescent {when} raised {type(error).__name__}: {error}; it says True, False or None",
            bench.transcripts,
            code=_simple_code("await engine.is_quiescent()"),
        ) from None
    took_s = loop.time() - began_s
    expect(
        answer is None or isinstance(answer, bool),
        f"is_quiescent {when} gave {answer!r} ({type(answer).__name__}); Dynamo takes True, False and None, "
        "and nothing that only counts as true",
        *bench.transcripts,
        code=_simple_code("assert await engine.is_quiescent() in (True, False, None)")
        if not isinstance(answer, int)
        else _simple_code("assert type(await engine.is_quiescent()) in (bool, type(None))"),
    )
    expect(
        took_s <= CHEAP_S,
        f"is_quiescent {when} took {took_s:.2f} s; it looks and says, and the worker polls it",
        *bench.transcripts,
        code=_simple_code(f"await asyncio.wait_for(engine.is_quiescent(), {CHEAP_S})"),
    )
    if answer is True and before:
        expect(
            not _transfers(probe),
            f"is_quiescent gave True while the engine's probe counts {_transfers(probe)} KV transfers; cleanup comes "
            "next and frees the memory under them",
            *bench.transcripts,
            code=_quiescent_code_for_probe(bench),
        )
    return answer


def _transfers(probe: Any) -> int:
    return int(probe.in_use().get("transfers", 0)) if probe is not None else 0


def _simple_code(line: str) -> str:
    return f"engine, _ = await Engine.from_args(ARGV)\nawait engine.start(1)\n{line}\nawait engine.cleanup()"


def _quiescent_code(stream: Stream, judges: str) -> str:
    return "\n".join(
        [
            "from dynamo._core import Context",
            "engine, _ = await Engine.from_args(ARGV)",
            "await engine.start(1)",
            "answers = []",
            "for number in range(4):",
            f"    stream = engine.generate({as_code(stream.transcript.request)}, context=Context(f'r{{number}}'))",
            "    async for chunk in stream: answers.append(await engine.is_quiescent())",
            "await asyncio.sleep(2)",
            "answers += [await engine.is_quiescent() for _ in range(4)]",
            "await engine.cleanup()",
            judges,
        ]
    )


def _quiescent_code_for_probe(bench: Bench) -> str:
    request = bench.transcripts[0].request if bench.transcripts else {}
    return "\n".join(
        [
            "from dynamo._core import Context",
            "engine, _ = await Engine.from_args(ARGV)",
            "await engine.start(1)",
            f"async for chunk in engine.generate({as_code(request)}, context=Context('r1')): print(chunk)",
            "for _ in range(20):",
            "    transfers, answer = engine.conformance_probe().in_use()['transfers'], await engine.is_quiescent()",
            "    assert not (transfers and answer), (transfers, answer)",
            "    await asyncio.sleep(0.005)",
            "await engine.cleanup()",
        ]
    )
