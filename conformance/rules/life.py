"""
Rules on an engine's life: `cleanup` in every state, and what is left after it and after many requests.

Nearly all of these make engines of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import inspect
import itertools
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from conformance import release
from conformance.bench import Bench, Draw
from conformance.reproducer import as_code
from conformance.resources import Held, held_now, probe_of
from conformance.rules import check
from conformance.rules.leaving import growing, leave_code, long_of, long_request, short_of, size_code, step_fraction
from conformance.runner_errors import NotHere
from conformance.streams import Stream
from conformance.transcript import Transcript, Violation, expect
from conformance.wire import requests

CLEANUP_WITHIN_S = 30.0  # above it Dynamo's worker ends the process, with status 911
LONGEST_BLOCK_S = 1.0  # real seconds in which nothing else runs on the event loop
SOAK_ROUND = 30  # requests
SOAK_S = 4.0  # of one round, on the real clock
LEAK_BYTES = 64  # for each request; less is noise
_SETTLE_S = 0.5  # real seconds for threads and processes to end


# cleanup, called.


async def clean(bench: Bench, engine: Any, what: str, code: str, *transcripts: Transcript) -> None:
    """Call cleanup; that it raises, or does not end, is a violation."""
    began_s = time.monotonic()
    try:
        async with asyncio.timeout(CLEANUP_WITHIN_S):
            await engine.cleanup()
    except TimeoutError:
        if time.monotonic() - began_s < CLEANUP_WITHIN_S and not bench.is_virtual:
            raise
        raise Violation(
            f"cleanup {what} has not ended after {CLEANUP_WITHIN_S:g} s; Dynamo's worker then ends the process",
            transcripts,
            code=code,
        ) from None
    except Exception as error:
        raise Violation(
            f"cleanup {what} raised {type(error).__name__}: {error}; it raises nothing, whatever there is to release",
            transcripts,
            code=code,
        ) from None


def _cleanup_code(*lines: str, starts: bool = True, times: int = 1) -> str:
    return "\n".join(
        [
            "engine, _ = await Engine.from_args(ARGV)",
            *(["await engine.start(1)"] if starts else []),
            *lines,
            *[f"await asyncio.wait_for(engine.cleanup(), {CLEANUP_WITHIN_S:g})"] * times,
        ]
    )


def _asked_lines(request: Mapping[str, Any], num_requests: int = 1) -> list[str]:
    """Requests that are under way."""
    return [
        "from dynamo._core import Context",
        "async def ask(request_id):",
        f"    async for chunk in engine.generate({as_code(request)}, context=Context(request_id)): pass",
        f"asked = [asyncio.ensure_future(ask(f'r{{i}}')) for i in range({num_requests})]",
        "await asyncio.sleep(0.05)",
    ]


@dataclass(frozen=True)
class _Past:
    """What an engine did before cleanup."""

    kind: str
    request: dict[str, Any]
    count: int

    async def live(self, bench: Bench, engine: Any) -> tuple[list[str], list[Stream]]:
        """Code for the same, and the streams that are still open."""
        if self.kind == "without requests":
            return [], []
        streams = [await bench.open(copy.deepcopy(self.request), engine=engine) for _ in range(self.count)]
        lines = _asked_lines(streams[0].transcript.request, self.count)
        if self.kind == "after a request":
            for stream in streams:
                await stream.finish(bench.answer_within_s())
            return [*lines, "await asyncio.gather(*asked)"], []
        await streams[0].wait_chunks(1, bench.answer_within_s())
        return lines, streams


def _past(bench: Bench, draw: Draw) -> _Past:
    kind = draw(st.sampled_from(["without requests", "after a request", "with requests under way"]))
    request, count = long_request(bench, draw), draw(st.integers(1, 3))
    return _Past(kind, short_of(request, 3) if kind == "after a request" else request, count)


@check("life.cleanup_never_started", needs_engine=False, max_examples=5)
async def cleanup_never_started(bench: Bench, draw: Draw) -> None:
    most = draw(st.integers(1, 3))
    engine = await bench.make()
    for times in range(1, most + 1):
        await clean(
            bench,
            engine,
            f"of an engine that was never started (call {times})",
            _cleanup_code(starts=False, times=times),
        )


@check("life.cleanup_twice", needs_engine=False, max_examples=10)
async def cleanup_twice(bench: Bench, draw: Draw) -> None:
    past, times, pause_s = _past(bench, draw), draw(st.integers(2, 3)), draw(st.sampled_from([0.0, 0.1]))
    engine = await bench.make_started()
    lines, streams = await past.live(bench, engine)
    for number in range(1, times + 1):
        try:
            await clean(
                bench,
                engine,
                f"for the {('first', 'second', 'third')[number - 1]} time ({past.kind})",
                _cleanup_code(*lines, times=number),
            )
        except Violation:
            if number == 1:
                return  # that is not about the second call
            raise
        await bench.let_pass(pause_s)
    for stream in streams:
        await stream.finish(bench.cancel_within_s)


@check("life.cleanup_noraise", needs_engine=False, max_examples=12)
async def cleanup_noraise(bench: Bench, draw: Draw) -> None:
    past, fraction = _past(bench, draw), draw(st.sampled_from([0.0, 0.5]))
    engine = await bench.make_started()
    lines, _ = await past.live(bench, engine)
    await step_fraction(bench, fraction)
    await clean(bench, engine, past.kind, _cleanup_code(*lines))
    gc.collect()
    expect(
        not bench.never_awaited,
        f"cleanup {past.kind}: {bench.never_awaited[:1]}; what it called has not run",
        code="\n".join(
            [
                "import gc, warnings",
                "engine, _ = await Engine.from_args(ARGV)",
                "await engine.start(1)",
                "with warnings.catch_warnings(record=True) as said:",
                "    warnings.simplefilter('always')",
                "    await engine.cleanup(); gc.collect()",
                "said = [str(one.message) for one in said if 'never awaited' in str(one.message)]",
                "assert not said, said",
            ]
        ),
    )


@check("life.cleanup_inflight", needs_engine=False, max_examples=12)
async def cleanup_inflight(bench: Bench, draw: Draw) -> None:
    request, count, place = long_request(bench, draw), draw(st.integers(1, 6)), draw(st.integers(0, 3))
    fraction = draw(st.sampled_from([0.0, 0.5]))
    engine = await bench.make_started()
    streams = [await bench.open(copy.deepcopy(request), engine=engine) for _ in range(count)]
    await streams[0].wait_chunks(place, bench.answer_within_s())
    await step_fraction(bench, fraction)
    for stream in streams:
        if not stream.is_over:
            stream.note("cleanup")
    try:
        await asyncio.wait_for(engine.cleanup(), CLEANUP_WITHIN_S)
    except Exception:
        assume(False)  # what cleanup itself does is for the other rules
    pause_s = (3 if place else fraction) * bench.facts.first_chunk_s
    code = _inflight_code(bench, streams[0].transcript.request, count, pause_s)
    for stream in streams:
        transcript = await stream.finish(bench.cancel_within_s)
        if transcript.of_kind("cleanup"):
            inflight_of(transcript, bench.cancel_within_s, code)


def inflight_of(transcript: Transcript, within_s: float, code: str = "") -> None:
    num_chunks = len(transcript.chunks) - len(transcript.chunks_after("cleanup"))
    expect(
        not transcript.is_hung,
        f"cleanup ran while a stream was open (after {num_chunks} chunks), and {within_s:g} s later it had not ended "
        f"({len(transcript.chunks) - num_chunks} more chunks came); end it with a terminal chunk or EngineShutdown",
        transcript,
        code=code,
    )
    expect(
        transcript.error is None or isinstance(transcript.error, release.exceptions("DynamoException")),
        f"cleanup ran while a stream was open (after {num_chunks} chunks), and it raised "
        f"{type(transcript.error).__name__}: {transcript.error}; a typed error (EngineShutdown) or a terminal chunk is "
        "wanted",
        transcript,
        code=code,
    )
    expect(
        transcript.error is not None or transcript.terminals,
        f"cleanup ran while a stream was open (after {num_chunks} chunks), and it ended without a terminal chunk",
        transcript,
        code=code,
    )


def _inflight_code(bench: Bench, request: Mapping[str, Any], count: int, pause_s: float) -> str:
    return "\n".join(
        [
            "from dynamo._core import Context",
            "from dynamo.llm.exceptions import DynamoException",
            "engine, _ = await Engine.from_args(ARGV)",
            "await engine.start(1)",
            "async def ask(request_id):",
            "    reason = None",
            "    try:",
            f"        async for chunk in engine.generate({as_code(request)}, context=Context(request_id)):",
            "            reason = chunk.get('finish_reason')",
            "    except DynamoException as error: reason = repr(error)",
            "    return reason",
            f"asked = [asyncio.ensure_future(ask(f'r{{i}}')) for i in range({count})]",
            f"await asyncio.sleep({pause_s:.4f})",
            "await engine.cleanup()",
            f"reasons = await asyncio.wait_for(asyncio.gather(*asked), {bench.cancel_within_s:g})",
            "assert all(reasons), reasons",
        ]
    )


@check("life.cleanup_quick", needs_engine=False, max_examples=4)
async def cleanup_quick(bench: Bench, draw: Draw) -> None:
    with_requests = draw(st.booleans())
    request = long_request(bench, draw)
    longest_s = block_s = float("inf")
    code = _quick_code([])
    for _ in range(2):  # a busy host can be slow too, but hardly twice
        engine = await bench.make_started()
        _hand_publishers(engine, await _sources(engine), _Recorder())
        if with_requests:
            stream = await bench.open(copy.deepcopy(request), engine=engine)
            await stream.wait_chunks(1, bench.answer_within_s())
            code = _quick_code(_asked_lines(stream.transcript.request))
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        with _LongestCallback() as callbacks:
            try:
                async with asyncio.timeout(CLEANUP_WITHIN_S + 1):
                    await asyncio.ensure_future(engine.cleanup())  # a task of its own, whose steps are timed
            except Exception as error:
                if not isinstance(error, TimeoutError):
                    return  # life.cleanup_noraise says so
        longest_s = min(longest_s, loop.time() - began_s)
        block_s = min(block_s, callbacks.longest_s)
        if longest_s <= CLEANUP_WITHIN_S and block_s <= LONGEST_BLOCK_S:
            return
    expect(
        longest_s <= CLEANUP_WITHIN_S,
        f"cleanup took more than {CLEANUP_WITHIN_S:g} s; Dynamo's worker then ends the process, with status 911",
        code=code,
    )
    expect(
        block_s <= LONGEST_BLOCK_S,
        f"while cleanup ran, nothing else on the event loop ran for {block_s:.1f} s; use asyncio.to_thread for what "
        f"takes longer than {LONGEST_BLOCK_S:g} s",
        code=code,
    )


def _quick_code(asked: list[str]) -> str:
    return "\n".join(
        [
            "import time",
            "engine, _ = await Engine.from_args(ARGV)",
            "await engine.start(1)",
            *asked,
            "times = []",
            "async def tick():",
            "    while True: times.append(time.monotonic()); await asyncio.sleep(0.01)",
            "ticking = asyncio.ensure_future(tick())",
            "await asyncio.sleep(0.05)",
            f"await asyncio.wait_for(engine.cleanup(), {CLEANUP_WITHIN_S:g})",
            "await asyncio.sleep(0.05)",
            "longest = max(later - sooner for sooner, later in zip(times, times[1:]))",
            f"assert longest < {LONGEST_BLOCK_S:g}, f'the event loop stood still for {{longest:.1f}} s'",
        ]
    )


class _LongestCallback:
    """How long the thread of the loop was inside one callback, in real seconds."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    def __enter__(self) -> _LongestCallback:
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


# A start that failed.


class Injected(RuntimeError):
    """What fails inside start, by the suite's doing."""


class FailingCalls:
    """
    Lets the n-th call fail that `start` makes: of the engine's own methods, or to start a thread, task or process.

    `failed` says which one it was, None if there were not so many; `num_of_kind` counts only calls of the same.
    """

    def __init__(self, engine: Any, number: int) -> None:
        self.failed: str | None = None
        self.num_of_kind = 0
        self._engine = engine
        self._left = number
        self._thread = threading.get_ident()
        self._is_on = False
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> FailingCalls:
        kind = type(self._engine)
        for name in sorted(set(dir(kind)) - {"start", "cleanup", "generate", "abort"}):
            if not name.startswith("__") and inspect.isfunction(inspect.getattr_static(kind, name)):
                self._replace(self._engine, name, f"engine.{name}")
        loop = asyncio.get_running_loop()
        self._replace(loop, "create_task", "loop.create_task")
        self._replace(threading.Thread, "start", "threading.Thread.start")
        self._replace(subprocess.Popen, "__init__", "subprocess.Popen.__init__")
        self._is_on = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_on = False
        for undo in reversed(self._undo):
            undo()

    def _replace(self, owner: Any, name: str, said: str) -> None:
        original = getattr(owner, name)
        own = vars(owner).get(name, self) if hasattr(owner, "__dict__") else self
        numbers = itertools.count(1)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._is_on and threading.get_ident() == self._thread:
                self._left -= 1
                number = next(numbers)
                if self._left == 0:
                    self.failed, self.num_of_kind = said, number
                    for arg in args:
                        if inspect.iscoroutine(arg):
                            arg.close()
                    raise Injected(f"call of {said} failed, by the suite's doing")
            return original(*args, **kwargs)

        try:
            setattr(owner, name, call)
        except (AttributeError, TypeError):
            return
        self._undo.append((lambda: delattr(owner, name)) if own is self else (lambda: setattr(owner, name, own)))


@check("life.cleanup_partial", needs_engine=False)
async def cleanup_partial(bench: Bench, draw: Draw) -> None:
    if bench.facts.start_s > 20:
        raise NotHere(f"a start takes {bench.facts.start_s:.0f} s; it cannot be made to fail many times")
    before = held_now()
    engine = await bench.make()
    points = [point for point in _fault_points(engine) if point.startswith("start")]
    point, number = draw(st.sampled_from([None, *points])), draw(st.integers(1, 12))
    if point is None:
        with FailingCalls(engine, number) as calls:
            error = await _start_error(engine)
        if calls.failed is None and number == 1:
            raise NotHere("start makes no call that could be made to fail, and the probe has no fault points in it")
        assume(calls.failed is not None)
        where = f"at its call of {calls.failed}"
        code = _partial_code("", calls.failed or "", calls.num_of_kind)
    else:
        probe_of(engine).inject(point)
        error = await _start_error(engine)
        where = f"at {point}"
        code = _partial_code(point)
    what = f"after a start that failed {where} ({error!r})" if error else f"after a fault in start {where}"
    await clean(bench, engine, what, code)
    left = await still_held(before)
    expect(
        not left,
        f"cleanup {what} left {', '.join(left)}; all that start had made by then must go",
        code=code,
    )


def _fault_points(engine: Any) -> list[str]:
    points = getattr(probe_of(engine), "fault_points", None)
    return list(points()) if callable(points) else []


async def _start_error(engine: Any) -> BaseException | None:
    try:
        await engine.start(1)
    except (Exception, SystemExit) as error:
        return error.with_traceback(None)
    return None


_HELD_LINES = (
    "import os, pathlib, threading",
    "def held():",
    "    children = ''.join(p.read_text() for p in pathlib.Path('/proc/self/task').glob('*/children')).split()",
    "    return [*threading.enumerate(), *asyncio.all_tasks(), *children, *os.listdir('/proc/self/fd')]",
)


def _partial_code(point: str, call: str = "", number: int = 0) -> str:
    if point:
        fails, undo = [f"engine.conformance_probe().inject({point!r})"], ""
    else:
        owner = {
            "loop.create_task": "loop",
            "threading.Thread.start": "threading.Thread",
            "subprocess.Popen.__init__": "subprocess.Popen",
        }.get(call, "engine")
        name = call.rpartition(".")[2]
        fails = [
            *(["import subprocess"] if owner == "subprocess.Popen" else []),
            f"usual, numbers = {owner}.{name}, iter(range(1, 100_000))",
            "def fails_once(*args, **kwargs):",
            f"    if next(numbers) == {number}: raise RuntimeError('injected')",
            "    return usual(*args, **kwargs)",
            f"{owner}.{name} = fails_once",
        ]
        undo = f"{owner}.{name} = usual"
    return "\n".join(
        [
            *_HELD_LINES,
            "engine, _ = await Engine.from_args(ARGV)",
            "loop, before = asyncio.get_running_loop(), held()",
            *fails,
            "try: await engine.start(1)",
            "except Exception as error: print('start:', repr(error))",
            *([undo] if undo else []),
            "await engine.cleanup()",
            "await asyncio.sleep(0.5)",
            "assert len(left := held()) <= len(before), (left, before)",
        ]
    )


async def still_held(before: Held) -> list[str]:
    """What is held beyond `before` once threads and processes had their time; the loop's own threads do not count."""
    end_s = time.monotonic() + _SETTLE_S
    while True:
        for _ in range(3):
            await asyncio.sleep(0)
        left = [name for name in held_now().beyond(before) if not name.startswith("thread asyncio_")]
        if not left or time.monotonic() > end_s:
            return left
        time.sleep(0.002)  # noqa: ASYNC251  (the loop's own time may be virtual)


# After cleanup.


class _Recorder:
    """A KV event or snapshot publisher that counts its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*_: Any, **__: Any) -> None:
            self.calls.append(name)

        return call


async def _sources(engine: Any) -> list[Any]:
    ask = getattr(engine, "kv_event_sources", None)
    return list(await ask() or ()) if ask is not None else []


def _hand_publishers(engine: Any, sources: list[Any], recorder: _Recorder) -> int:
    """Give the engine its publishers, as the worker does after start; how many."""
    num_given = 0
    for source in sources:
        if type(source).__name__ == "PushSource":
            source.on_ready(recorder)
            num_given += 1
    ranks = getattr(engine, "component_metrics_dp_ranks", list)
    if ranks():
        engine.attach_snapshot_publisher(recorder)
        num_given += 1
    return num_given


@check("life.threads_stopped", needs_engine=False, max_examples=6)
async def threads_stopped(bench: Bench, draw: Draw) -> None:
    request = draw(requests(max_tokens=st.integers(1, 4)))
    leaves_open = draw(st.booleans())
    left: list[str] = []
    for _ in range(2):  # what a library opens once for the whole process is there after the first time
        before = held_now()
        engine = await bench.make()
        await engine.start(1)
        _hand_publishers(engine, await _sources(engine), _Recorder())
        stream = await bench.open(copy.deepcopy(request), engine=engine)
        if leaves_open:
            await stream.wait_chunks(1, bench.answer_within_s())
            await stream.drop()
        await stream.finish(bench.answer_within_s())
        with_requests = stream.transcript.request
        try:
            await asyncio.wait_for(engine.cleanup(), CLEANUP_WITHIN_S)
        except Exception:
            return  # life.cleanup_noraise and life.cleanup_quick say so
        left = await still_held(before)
        if not left:
            return
    expect(
        not left,
        f"cleanup has returned, and {', '.join(sorted(left))} of the engine is still there; it ends all it started",
        stream.transcript,
        code=_threads_code(with_requests),
    )


def _threads_code(request: Mapping[str, Any]) -> str:
    return "\n".join(
        [
            *_HELD_LINES,
            "from dynamo._core import Context",
            "class Publisher:",
            "    def __getattr__(self, name): return lambda *_, **__: None",
            "engine, _ = await Engine.from_args(ARGV)",
            "before = held()",
            "await engine.start(1)",
            "for source in await engine.kv_event_sources(): source.on_ready(Publisher())",
            f"async for chunk in engine.generate({as_code(request)}, context=Context('r1')): print(chunk)",
            "await engine.cleanup()",
            "await asyncio.sleep(0.3)",
            "left = held()",
            "assert len(left) <= len(before), (left, before)",
        ]
    )


@check("life.no_publish_after", needs_engine=False, max_examples=10)
async def no_publish_after(bench: Bench, draw: Draw) -> None:
    request, count = long_request(bench, draw), draw(st.integers(0, 3))
    drops, pause_s = draw(st.booleans()), draw(st.sampled_from([0.0, 1.5])) if bench.is_virtual else 0.3
    engine = await bench.make_started()
    recorder = _Recorder()
    if not _hand_publishers(engine, await _sources(engine), recorder):
        raise NotHere("the engine asks for no publisher")
    streams = [await bench.open(copy.deepcopy(request), engine=engine) for _ in range(count)]
    for stream in streams:
        await stream.wait_chunks(1, bench.answer_within_s())
    try:
        await asyncio.wait_for(engine.cleanup(), CLEANUP_WITHIN_S)
    except Exception:
        assume(False)
    num_calls = len(recorder.calls)
    for stream in streams:
        await (stream.drop() if drops else stream.abort())
        await stream.finish(bench.cancel_within_s)
    await bench.let_pass(pause_s)
    await bench.let_threads_run(lambda: len(recorder.calls) > num_calls, patience_s=0.02)
    late = recorder.calls[num_calls:]
    expect(
        not late,
        f"after cleanup had returned, the engine called {late[:4]} of its publishers; Dynamo may have destroyed them",
        *(stream.transcript for stream in streams),
        code=_late_publish_code(request),
    )


def _late_publish_code(request: Mapping[str, Any]) -> str:
    return "\n".join(
        [
            "from dynamo._core import Context",
            "calls = []",
            "class Publisher:",
            "    def __getattr__(self, name): return lambda *_, **__: calls.append(name)",
            "engine, _ = await Engine.from_args(ARGV)",
            "await engine.start(1)",
            "for source in await engine.kv_event_sources(): source.on_ready(Publisher())",
            "if engine.component_metrics_dp_ranks(): engine.attach_snapshot_publisher(Publisher())",
            f"streams = [engine.generate({as_code(request)}, context=Context(f'r{{i}}')) for i in range(2)]",
            "for stream in streams: await stream.__anext__()",
            "await engine.cleanup()",
            "calls.clear()",
            "for stream in streams: await stream.aclose()",
            "await asyncio.sleep(1.5)",
            "assert not calls, calls",
        ]
    )


@check("life.generate_after", needs_engine=False, max_examples=8)
async def generate_after(bench: Bench, draw: Draw) -> None:
    before_start = draw(st.booleans())
    request = short_of(long_request(bench, draw), 3)
    engine = await (bench.make() if before_start else bench.make_started())
    if not before_start:
        try:
            await asyncio.wait_for(engine.cleanup(), CLEANUP_WITHIN_S)
        except Exception:
            return  # life.cleanup_noraise and life.cleanup_quick say so
    when = "before start" if before_start else "after cleanup"
    stream = await bench.open(request, engine=engine)
    transcript = await stream.finish(bench.cancel_within_s)
    generate_after_of(transcript, when)


def generate_after_of(transcript: Transcript, when: str) -> None:
    code = "\n".join(
        [
            "from dynamo._core import Context",
            "from dynamo.llm.exceptions import DynamoException",
            "engine, _ = await Engine.from_args(ARGV)",
            *(["await engine.start(1)", "await engine.cleanup()"] if when == "after cleanup" else []),
            "reason = None",
            "async def ask():",
            f"    async for chunk in engine.generate({as_code(transcript.request)}, context=Context('r1')):",
            "        if chunk.get('finish_reason'): return True",
            "try: ended = await asyncio.wait_for(ask(), 10)",
            "except DynamoException: ended = True",
            "assert ended, 'no terminal chunk'",
        ]
    )
    expect(
        not transcript.is_hung,
        f"generate {when} neither answers nor raises; raise EngineShutdown",
        transcript,
        code=code,
    )
    expect(
        transcript.error is None or isinstance(transcript.error, release.exceptions("DynamoException")),
        f"generate {when} raised {type(transcript.error).__name__}: {transcript.error}; the typed error for it is "
        "EngineShutdown",
        transcript,
        code=code,
    )
    expect(
        transcript.error is not None or transcript.terminals,
        f"generate {when} ended without a terminal chunk and without an error",
        transcript,
        code=code,
    )


# Many requests.


@check("life.soak", in_process=True, max_examples=1)
async def soak(bench: Bench, draw: Draw) -> None:
    del draw  # each try takes long, and what is drawn is tried again many times
    request = await bench.prepared(short_of(long_of(bench, [2, 3, 5, 7, 11, 13, 17, 19]), 3))
    kinds: list[dict[str, Any]] = [{}, {"stop_after": 1}, {"drop_after": 1}]
    number = 0

    async def one() -> None:
        nonlocal number
        number += 1
        # Nothing of it is kept by the suite, so that memory that grows is the engine's.
        stream = Stream(
            "bridge", bench.engine, request, f"soak-{bench.next_id()}", **kinds[number % 3 if number > 3 else 0]
        )
        await stream.finish(bench.answer_within_s())

    suspects = await growing(bench, bench.engine, one)
    for path, (size, count) in suspects.items():
        expect(
            False,
            f"over {count} requests with the same prompt, engine{path} has grown by {size}; a worker runs for weeks, "
            "and runs out of memory",
            *[await bench.talk(request, as_is=True)],
            code=leave_code(bench, "whole", request, 1, size_code(path), 100),
        )
    grown_bytes, count = await _grown_bytes(bench, one)
    expect(
        grown_bytes < LEAK_BYTES * count,
        f"over {count} requests with the same prompt, memory has grown by {grown_bytes} bytes "
        f"({grown_bytes // count} a request), in every round; a worker runs for weeks, and runs out of it",
        *[await bench.talk(request, as_is=True)],
        code=leave_code(
            bench,
            "whole",
            request,
            1,
            f"(__import__('gc').collect(), __import__('tracemalloc').get_traced_memory()[0] // {LEAK_BYTES})[1]",
            200,
        ).replace("await engine.start(1)", "await engine.start(1); __import__('tracemalloc').start()", 1),
    )


async def _grown_bytes(bench: Bench, one: Callable[[], Any]) -> tuple[int, int]:
    """
    Bytes by which memory grew over so many requests; (0, n) as soon as two rounds show no growth.

    Two, because something else may be freed in one of them, and hide what the engine keeps. What it keeps for others
    for a while (a KV cache that a decode worker may fetch) is no growth: each round begins and ends without.
    """
    is_asked = bench.facts.has("quiescence")

    async def until_quiescent() -> None:
        nonlocal is_asked
        if is_asked:
            is_asked = await _comes_to_rest(bench)

    async def round_of(is_enough: Callable[[int], bool]) -> tuple[int, int]:
        await until_quiescent()
        gc.collect()
        before, number = tracemalloc.get_traced_memory()[0], 0
        while not is_enough(number):
            await one()
            number += 1
        await bench.let_pass(0.1)
        await until_quiescent()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before, number

    def short(number: int) -> bool:
        return number >= SOAK_ROUND

    def long(number: int) -> bool:
        """A history of bounded length, or of bounded time, fills up meanwhile, and then stays."""
        lasted_s = time.monotonic() - began_s
        return number >= 2 * SOAK_ROUND and (lasted_s > SOAK_S or (bench.is_virtual and number >= 60 * SOAK_ROUND))

    was_tracing = tracemalloc.is_tracing()
    if not was_tracing:
        tracemalloc.start()
    try:
        await round_of(short)
        total = count = num_flat = 0
        for is_enough in (short, short, short, long, short, short, short, short):
            began_s = time.monotonic()
            growth, number = await round_of(is_enough)
            total, count = total + growth, count + number
            num_flat += growth < LEAK_BYTES * number
            if num_flat == 2:
                return 0, count
        return total, count
    finally:
        if not was_tracing:
            tracemalloc.stop()


async def _comes_to_rest(bench: Bench) -> bool:
    """Whether the engine says within the time of an answer that it is quiescent. (If it cannot: the rules of drain.)"""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(bench.answer_within_s()):
            while await bench.engine.is_quiescent() is False:
                await bench.let_pass(0.05)
            return True
    return False
