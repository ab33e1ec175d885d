"""
Rules on what an engine tells of its load: ranks, snapshots, and Prometheus.

The checks named `*_of` are pure: they take what was recorded and raise.
"""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from conformance.bench import Bench, Draw
from conformance.bridge import on_foreign_thread
from conformance.recording import RecordingMetrics, Served, Snapshot, serve
from conformance.reproducer import as_code
from conformance.rules import check
from conformance.runner_errors import NotHere
from conformance.transcript import Transcript, Violation, expect
from conformance.wire import requests, wire_request

MAX_U32 = 2**32 - 1
MAX_U64 = 2**64 - 1
_TOLERANCE = 1e-6  # a ratio that was made by dividing
_PATIENCE_S = 0.4  # real seconds for a thread of the engine to publish once


@check("metrics.ranks", in_process=True, max_examples=6)
async def ranks(bench: Bench, draw: Draw) -> None:
    calls = []
    for _ in range(draw(st.integers(2, 4))):
        calls.append(await on_foreign_thread(bench.engine.component_metrics_dp_ranks))
        if draw(st.booleans()):
            await bench.talk(draw(requests(max_tokens=st.integers(1, 3))))
    ranks_of(calls)


def ranks_of(calls: Sequence[Any]) -> None:
    """`calls`: what each call gave."""
    code = """\
engine, _ = await Engine.from_args(ARGV)
await engine.start(1)
ranks, again = engine.component_metrics_dp_ranks(), engine.component_metrics_dp_ranks()
await engine.cleanup()
assert type(ranks) is list and all(0 <= rank.__index__() < 2**32 for rank in ranks), ranks
assert len(set(ranks)) == len(ranks) and ranks == again, (ranks, again)"""
    for given in calls:
        expect(
            isinstance(given, list),
            f"component_metrics_dp_ranks gave {_short(given)}, a {type(given).__name__}; the bridge takes a list only, "
            "and anything else ends start-up",
            code=code,
        )
        wrong = [rank for rank in given if not (hasattr(rank, "__index__") and 0 <= int(rank) <= MAX_U32)]
        expect(not wrong, f"component_metrics_dp_ranks has {wrong[:1]}; ranks are ints from 0 to 2^32 - 1", code=code)
        expect(
            len(set(given)) == len(given),
            f"component_metrics_dp_ranks gave {given}, with a rank more than once",
            code=code,
        )
        expect(
            sorted(given) == sorted(calls[0]),
            f"component_metrics_dp_ranks gave {calls[0]} first and {given} later; it is the same for the engine's life",
            code=code,
        )


@check("metrics.snapshot", needs_engine=False, max_examples=10)
async def snapshot(bench: Bench, draw: Draw) -> None:
    served = await serve(bench)
    batch = served.too_much() if draw(st.booleans()) else []
    if not batch:
        context, block_size = served.numbers["context_length"], served.numbers["kv_cache_block_size"] or 16
        max_isl = min(64, context - 8) if isinstance(context, int) else 64
        several = st.lists(requests(max_isl=max_isl, max_tokens=st.integers(2, 8)), max_size=4)
        batch = [wire_request([3] * min(max_isl, 2 * block_size + 1), max_tokens=4), *draw(several)]
    streams = [
        await bench.open(request, engine=served.engine, stop_after=draw(st.none() | st.integers(1, 3)) if i else None)
        for i, request in enumerate(batch)
    ]
    if served.has_threads:
        before = len(served.snapshots.snapshots)
        await bench.let_threads_run(lambda: len(served.snapshots.snapshots) > before, _PATIENCE_S)
    for stream in streams:
        await stream.finish(bench.answer_within_s())
    await served.settle()
    if not served.snapshots.snapshots:
        raise NotHere("no snapshot was published while requests ran")
    snapshot_of(served.snapshots.snapshots, served.ranks, bench.transcripts)


def snapshot_of(snapshots: Sequence[Snapshot], ranks: Sequence[int], transcripts: Sequence[Transcript] = ()) -> None:
    for one in snapshots:
        code = _snapshot_script(transcripts, ranks)
        for problem in type_problems(one, ranks):
            expect(False, problem, *transcripts, code=code)
        for problem in range_problems(one):
            expect(False, problem, *transcripts, code=code, is_should=True)


def type_problems(snapshot: Snapshot, ranks: Sequence[int]) -> list[str]:
    """What the bridge refuses or drops."""
    fields = snapshot.fields
    problems = []
    for name in ("kv_used_blocks", "kv_total_blocks"):
        value = fields.get(name, "absent")
        if not _is_int(value) or not 0 <= int(value) <= MAX_U64:
            problems.append(f"{name} is {value!r}; it is an int of at least 0")
    usage, hit_rate = fields.get("gpu_cache_usage", "absent"), fields.get("kv_cache_hit_rate")
    for name, value in (("gpu_cache_usage", usage), ("kv_cache_hit_rate", hit_rate)):
        if not _is_number(value) and not (value is None and name == "kv_cache_hit_rate"):
            problems.append(f"{name} is {value!r}; it is a number")
    for rank in (snapshot.rank, fields.get("dp_rank", snapshot.rank)):
        if rank not in list(ranks):
            problems.append(
                f"a snapshot is of rank {rank!r}, and component_metrics_dp_ranks declared {list(ranks)}; "
                "the publisher drops it in silence"
            )
    return problems


def range_problems(snapshot: Snapshot) -> list[str]:
    """What makes no sense, of a snapshot whose types are right."""
    fields = snapshot.fields
    usage, hit_rate = fields["gpu_cache_usage"], fields.get("kv_cache_hit_rate")
    problems = []
    used, total = int(fields["kv_used_blocks"]), int(fields["kv_total_blocks"])
    if used > total:
        problems.append(f"a snapshot says that {used} of {total} KV blocks are used")
    for name, value in (("gpu_cache_usage", usage), ("kv_cache_hit_rate", hit_rate)):
        if value is not None and not -_TOLERANCE <= value <= 1 + _TOLERANCE:  # never true of NaN
            problems.append(f"{name} is {value!r}; it is a ratio from 0 to 1" + ", not a percentage" * (value > 1))
    return problems


def _snapshot_script(transcripts: Sequence[Transcript], ranks: Sequence[int]) -> str:
    talks = ", ".join(as_code(dict(transcript.request)) for transcript in transcripts)
    hold_s = 0.3 if all(len(transcript.chunks) <= 1 for transcript in transcripts) else 0  # else it is over at once
    return f"""\
from dynamo._core import Context
class Publisher:
    def publish(self, dp_rank, snap): snapshots.append((dp_rank, dict(vars(snap))))
    def publish_stored(self, *_, **__): pass
    publish_removed = publish_batch = publish_stored
snapshots, engine = [], (await Engine.from_args(ARGV))[0]
await engine.start(1)
for source in await engine.kv_event_sources(): source.on_ready(Publisher())
engine.attach_snapshot_publisher(Publisher())
async def talk(i, request):
    async for _ in engine.generate(request, context=Context(f"r{{i}}")): await asyncio.sleep({hold_s})
talks = asyncio.gather(*(talk(i, request) for i, request in enumerate([{talks}])))
for _ in range(200): await asyncio.sleep(0); __import__("time").sleep(0.001)  # the requests are under way
await talks; await asyncio.sleep(1); await engine.cleanup()
for rank, s in snapshots:
    assert isinstance(s["kv_used_blocks"], int) and 0 <= s["kv_used_blocks"] <= s["kv_total_blocks"], s
    assert 0 <= s["gpu_cache_usage"] <= 1 and 0 <= (s["kv_cache_hit_rate"] or 0) <= 1, s
    assert rank in {list(ranks)!r} and s["dp_rank"] in {list(ranks)!r}, (rank, s)"""


@check("metrics.attach_once", needs_engine=False, max_examples=8)
async def attach_once(bench: Bench, draw: Draw) -> None:
    errors: list[str] = []
    usual_hook, threading.excepthook = threading.excepthook, lambda args: errors.append(_thread_error(args))
    try:
        served = await serve(bench, with_kv=draw(st.booleans()), with_snapshots=False)
        is_late = draw(st.booleans())
        for i in range(draw(st.integers(1, 3))):
            stream = await bench.open(draw(requests(max_tokens=st.integers(4, 12))), engine=served.engine)
            if is_late and i == 0:
                await stream.wait_chunks(1, bench.answer_within_s())
                await _attach(served)
            transcript = await stream.finish(bench.answer_within_s())
            error = transcript.error
            expect(
                error is None and not transcript.is_hung,
                f"attach_snapshot_publisher was {'called late' if is_late else 'never called'}, and a request "
                f"{'raised ' + repr(error) if error is not None else 'never ended'}; without KV routing a worker never "
                "calls it",
                transcript,
                shows="chunks[-1].get('finish_reason')",
            )
        if served.has_threads:
            await bench.let_threads_run(lambda: bool(errors), 0.2)
        expect(
            not errors,
            f"without a snapshot publisher a thread of the engine died: {errors[:1]}; "
            "without KV routing a worker never calls attach_snapshot_publisher",
            *bench.transcripts,
        )
    finally:
        threading.excepthook = usual_hook


async def _attach(served: Served) -> None:
    try:
        await on_foreign_thread(lambda: served.engine.attach_snapshot_publisher(served.snapshots))
    except Exception as error:
        raise Violation(
            f"attach_snapshot_publisher raised {type(error).__name__}: {error} when a request was under way",
            code="""\
from dynamo._core import Context
engine, _ = await Engine.from_args(ARGV)
await engine.start(1)
stream = engine.generate({"token_ids": [1, 2], "stop_conditions": {"max_tokens": 4}}, context=Context("r1"))
await stream.__anext__()
engine.attach_snapshot_publisher(type("Publisher", (), {"publish": lambda *_: None})())
await stream.aclose()
await engine.cleanup()""",
        ) from error


def _thread_error(args: Any) -> str:
    return f"{args.exc_type.__name__}: {args.exc_value}"


@check("metrics.prometheus", needs_engine=False, max_examples=4)
async def prometheus(bench: Bench, draw: Draw) -> None:
    labels = draw(st.dictionaries(st.sampled_from(["dynamo_namespace", "model", "worker_id"]), st.text(max_size=8)))
    engine = await bench.make_started()
    callbacks: list[Any] = []
    metrics: Any = RecordingMetrics(labels, callbacks)
    handle = weakref.ref(metrics)
    code = """\
import gc, weakref
class Metrics:
    auto_labels = {"model": "m"}
    def register_prometheus_expfmt_callback(self, callback): callbacks.append(callback)
    register_prometheus_typed_callback = register_prometheus_expfmt_callback
callbacks, metrics = [], Metrics()
handle = weakref.ref(metrics)
engine, _ = await Engine.from_args(ARGV)
await engine.start(1)
await engine.register_prometheus(metrics)
del metrics
gc.collect()
await engine.cleanup()
assert handle() is None, "the metrics handle is still held"
"""
    try:
        await engine.register_prometheus(metrics)
    except Exception as error:
        raise Violation(
            f"register_prometheus raised {type(error).__name__}: {error}; that ends start-up", code=code
        ) from error
    del metrics
    gc.collect()
    expect(
        handle() is None,
        "after register_prometheus returned, something still holds the metrics it was given "
        f"({len(callbacks)} callbacks are registered); take auto_labels from it and let it go",
        code=code,
    )


def _is_int(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return not isinstance(value, str | bool) and hasattr(value, "__float__") and not math.isinf(float(value))


def _short(value: Any) -> str:
    return repr(value)[:60]
