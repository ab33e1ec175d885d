"""A timeline of a simulation: every moment of every request is in it once, and any reader can draw it."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import tempfile
import tracemalloc
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simpy.core import EmptySchedule

from mock_engine.core import Core
from mock_engine.deployment import DeploymentSettings, WorkerGroup
from mock_engine.drive_virtual import Flight, Stretch, VirtualClock, VirtualDrive
from mock_engine.engine_settings import EngineSettings
from mock_engine.errors import ConfigError
from mock_engine.event_file import _BATCH
from mock_engine.request import Request
from mock_engine.sequence import SequenceState
from mock_engine.simulation import SimulationSettings, simulate
from mock_engine.trace_events import TraceEvents
from mock_engine.workload import Workload
from tests.helpers.virtual import Notes, timed_requests
from tests.helpers.workloads import BLOCK_SIZE, MAX_MODEL_LEN, make_core, step_s, ticking_step_s

ONE_WORKER = DeploymentSettings((WorkerGroup(EngineSettings()),))
RUNS, WAITS = {"prefill", "decode"}, {"queue", "preempted"}
KEPT = {"KV kept", "KV transfer"}

options = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(MAX_MODEL_LEN // BLOCK_SIZE, 40),
        "max_num_seqs": st.integers(1, 8),
        "max_num_batched_tokens": st.integers(8, 64),
        "enable_prefix_caching": st.booleans(),
        "timing": st.sampled_from([step_s, ticking_step_s]),
        "jitter": st.sampled_from([0.0, 0.05]),
    }
)


@dataclass(frozen=True)
class Span:
    """Times are microseconds; `parts` are the spans within it."""

    pid: int
    name: str
    start: int
    end: int
    args: dict
    parts: list


@dataclass(frozen=True)
class Trace:
    names: dict[int, str]  # of processes
    requests: list[Span]  # in the order in which they began
    counters: dict[tuple[int, str], list[tuple[int, dict]]]  # (pid, name) -> (when, values from then on)
    num_lanes: int
    max_open: int  # requests under way at once, each in its process


def read(path):
    """The trace, after checking all that the format asks for."""
    text = path.read_bytes()
    document = json.loads(gzip.decompress(text) if path.suffix == ".gz" else text)
    assert document["displayTimeUnit"] == "ms"
    names, lane_of, stacks, requests = {}, {}, defaultdict(list), []
    counters, last = defaultdict(list), defaultdict(int)
    open_now, max_open = Counter(), Counter()
    for event in document["traceEvents"]:
        pid, args = event["pid"], event.get("args", {})
        assert type(pid) is int
        if event["ph"] == "M":
            if event["name"] == "process_name":
                names[pid] = args["name"]
            elif event["name"] == "thread_name":
                assert event["tid"] not in lane_of, "a thread has one name"
                lane_of[event["tid"]] = pid
            else:
                assert event["name"] in ("process_sort_index", "thread_sort_index")
            continue
        at = event["ts"]
        assert type(at) is int, "whole microseconds"
        if event["ph"] == "C":
            seen = counters[pid, event["name"]]
            assert not seen or (at >= seen[-1][0] and args != seen[-1][1]), "a counter says what is new, in order"
            seen.append((at, args))
            continue
        tid = event["tid"]
        assert lane_of[tid] == pid, "a lane is named first, and belongs to one process"
        assert at >= last[tid], "time runs on"
        last[tid] = at
        stack = stacks[tid]
        if event["ph"] == "B":
            assert len(stack) < 2
            if stack:
                assert stack[0]["name"].startswith("request-")
            stack.append({"pid": pid, "name": event["name"], "start": at, "args": args, "parts": []})
            if len(stack) == 1:
                requests.append(stack[0])
                open_now[pid] += 1
                max_open[pid] = max(max_open[pid], open_now[pid])
            continue
        assert event["ph"] == "E"
        span = stack.pop()
        span["end"], span["args"] = at, span["args"] | args
        if stack:
            stack[-1]["parts"].append(Span(**span))
        else:
            open_now[pid] -= 1
    assert not any(stacks.values()), "every span is closed"
    assert not set(lane_of) & set(names), "no thread looks like the main thread of a process"
    spans = [Span(**span) for span in requests]
    return Trace(names, spans, dict(counters), len(lane_of), sum(max_open.values()))


def check(trace):
    """What holds for each trace, also for one that was cut short."""
    assert trace.num_lanes == trace.max_open, "lanes are taken again"
    for request in trace.requests:
        edges = [request.start, *(part.end for part in request.parts)]
        assert [part.start for part in request.parts] == edges[:-1], "one part begins where the last ended"
        assert edges[-1] == request.end, "no moment of it is left out"
        assert all(part.end > part.start for part in request.parts)
        assert all(
            part.args.keys()
            == {"prefill": {"new_tokens", "past_tokens"}, "decode": {"tokens"}, "KV transfer": {"bytes"}}.get(
                part.name, set()
            )
            for part in request.parts
        )
    for pid in trace.names:
        requests = [request for request in trace.requests if request.pid == pid]
        end = max((request.end for request in requests), default=0)
        for name, parts in (("running", RUNS), ("waiting", WAITS)):
            shown = area([(at, values[name]) for at, values in trace.counters.get((pid, "requests"), [])], end)
            drawn = sum(part.end - part.start for each in requests for part in each.parts if part.name in parts)
            assert shown == drawn, f"{name}: what is counted is what is drawn"
        for _, values in trace.counters.get((pid, "KV blocks"), []):
            assert 0 <= values["used %"] <= 100


def area(steps, end):
    """Integral of a counter."""
    moments = [at for at, _ in steps] + [max(end, steps[-1][0]) if steps else end]
    return sum(value * (after - at) for (at, value), (_, after) in zip(steps, pairwise(moments), strict=True))


class CountingCore(Core):
    """Notes how many KV blocks are in use when a step begins."""

    def begin_step(self):
        step = super().begin_step()
        self.used.append((us(self.clock.now), self.scheduler.blocks.num_used))
        return step


def us(seconds):
    return round(seconds * 1e6)


def drive(workload, path, is_single_stepping=False, max_events=None, **options):
    """Run it and write a trace; returns what the listener heard, and the core."""
    plain = make_core(**options)
    core = CountingCore(plain.scheduler, plain._times)
    clock, notes = VirtualClock(), Notes()
    core.clock, core.used = clock, []
    trace = TraceEvents(path, ONE_WORKER)
    virtual = VirtualDrive(clock, core, notes, trace.observer_of(0, 0), is_single_stepping)

    def submit(timed):
        def at_arrival(_):
            flight = virtual.submit(timed.request)
            if timed.cancel_s is not None:
                clock.call_at(timed.cancel_s, lambda _: virtual.cancel(flight))

        return at_arrival

    for timed in workload:
        clock.call_at(timed.arrival_s, submit(timed))
    try:
        if max_events is None:
            clock.run()
        for _ in range(max_events or 0):
            clock.step()
    except EmptySchedule:
        pass
    finally:
        trace.close()
        trace.close()
    return notes, core


@pytest.fixture(scope="module")
def path():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "timeline.json"


@given(workload=timed_requests(), options=options, is_single_stepping=st.booleans())
@settings(max_examples=150)
def test_every_moment_of_every_request_is_drawn_once_and_where_it_was(path, workload, options, is_single_stepping):
    """Chunked prefill, prefix hits, preemption, cancels: the spans say what the listener heard."""
    notes, core = drive(workload, path, is_single_stepping, **options)
    trace = read(path)
    check(trace)
    spans = {request.name.removeprefix("request-"): request for request in trace.requests}
    assert len(spans) == len(trace.requests) == len(workload)
    finished = {flight[0]: flight[1:] for flight in notes.flights}
    for timed in workload:
        request, span = timed.request, spans[timed.request.request_id]
        assert span.start == us(timed.arrival_s)
        parts = defaultdict(list)
        for part in span.parts:
            parts[part.name].append(part)
        num_tokens = sum(part.args["tokens"] for part in parts["decode"])
        if request.request_id not in finished:
            assert span.end == us(timed.cancel_s)
            assert span.args["status"] == "cancelled"
            continue
        _, first_token_s, _, last_token_s, num_cached, num_preemptions = finished[request.request_id]
        assert span.end == us(last_token_s)
        assert span.args == {
            "isl_tokens": request.isl_tokens,
            "osl_tokens": request.osl_tokens,
            "status": "finished",
            "output_tokens": request.osl_tokens,
            "cached_tokens": num_cached,
            "preemptions": num_preemptions,
            "ttft_ms": round((first_token_s - timed.arrival_s) * 1e3, 3),
        }
        assert len(parts["preempted"]) == num_preemptions
        assert us(first_token_s) in [part.end for part in parts["prefill"]]
        assert parts["prefill"][0].args["past_tokens"] == num_cached
        if not num_preemptions:
            assert num_tokens == request.osl_tokens - 1
            assert sum(part.args["new_tokens"] for part in parts["prefill"]) == request.isl_tokens - num_cached
            assert all(
                after.args["past_tokens"] == sum(before.args.values()) for before, after in pairwise(parts["prefill"])
            )
    if is_single_stepping:
        used = [(at, {"used %": round(100 * used / options["num_blocks"], 1)}) for at, used in core.used]
        assert changes(trace.counters[1, "KV blocks"]) == changes(used)


def changes(steps):
    """The last value of each moment, where it is another than before."""
    last_of = list(dict(steps).items())
    return last_of[:1] + [after for before, after in pairwise(last_of) if before[1] != after[1]]


@given(workload=timed_requests(), options=options)
@settings(max_examples=60)
def test_jumping_over_decode_steps_draws_what_single_steps_draw(path, workload, options):
    drive(workload, path, True, **options)
    single = path.read_text(encoding="ascii")
    drive(workload, path, False, **options)
    jumping = path.read_text(encoding="ascii")
    without_kv = [
        [line.rstrip(",") for line in text.split("\n") if "KV blocks" not in line] for text in (single, jumping)
    ]
    assert without_kv[0] == without_kv[1]


def test_a_kv_cache_that_grows_while_all_decode_is_drawn_step_by_step(tmp_path):
    trace = TraceEvents(tmp_path / "t.json", ONE_WORKER)
    observer = trace.observer_of(0, 0)
    observer.steps_done(Stretch(np.arange(7) / 2, 2, 0, 2, 0, 10, 15), 40)  # six steps of half a second
    observer.steps_done(Stretch(np.array([3.0, 3.5]), 2, 0, 2, 0, 15, 15), 40)
    observer.steps_done(Stretch(np.array([3.5]), 0, 0, 0, 0, 0, 0), 40)
    trace.close()
    used = [(at / 1e6, values["used %"]) for at, values in read(tmp_path / "t.json").counters[1, "KV blocks"]]
    assert used == [(0, 25.0), (0.5, 27.5), (1, 30.0), (1.5, 32.5), (2, 35.0), (2.5, 37.5), (3.5, 0.0)]


@given(workload=timed_requests(), options=options, num_events=st.integers(0, 150))
@settings(max_examples=100)
def test_a_run_that_is_cut_short_leaves_a_whole_file(path, workload, options, num_events):
    drive(workload, path, max_events=num_events, **options)
    check(read(path))


def disaggregated(engine=None, **changes):
    engine = engine or EngineSettings()
    groups = (WorkerGroup(engine, 2, "prefill"), WorkerGroup(engine, 2, "decode"))
    return DeploymentSettings(groups, **changes)


def trace_of(path, deployment, **load):
    trace = TraceEvents(path, deployment)
    try:
        results = simulate(SimulationSettings(deployment, Workload(**load)), observer_of=trace.observer_of)
        assert not any(engine._lanes for engine in trace._engines), "nothing is left to be ended by close"
    finally:
        trace.close()
    return results, read(path)


def test_a_kv_cache_on_its_way_is_drawn_where_it_comes_from(tmp_path):
    """On a slow link requests wait with their blocks for each other; the decode worker gets each when it is there."""
    _, trace = trace_of(
        tmp_path / "t.json", disaggregated(kv_transfer_bandwidth=2.0), isl=800, osl=20, concurrency=12, request_count=40
    )
    check(trace)
    assert list(trace.names.values()) == [
        f"worker {worker}, {role}, {EngineSettings().profile}"
        for worker, role in enumerate(["prefill", "prefill", "decode", "decode"])
    ]
    assert len(trace.requests) == 2 * 40
    decodes = {request.name: request for request in trace.requests if "decode" in trace.names[request.pid]}
    links = defaultdict(list)
    for request in trace.requests:
        if "prefill" in trace.names[request.pid]:
            transfer = request.parts[-1]
            assert transfer.name == "KV transfer"
            assert transfer.end - transfer.start == pytest.approx(transfer.args["bytes"] / 2e3, abs=1)
            assert decodes[request.name].start == transfer.end
            links[request.pid].append((transfer.start, transfer.end))
            links[decodes[request.name].pid].append((transfer.start, transfer.end))
        else:
            assert [part.name for part in request.parts if part.name != "queue"] == ["prefill", "decode"]
    assert any(part.name == "KV kept" for request in trace.requests for part in request.parts)
    for spans in links.values():
        assert all(before[1] <= after[0] for before, after in pairwise(sorted(spans))), "a link carries one at a time"


@pytest.mark.parametrize("losses_s", [{0: 0.4}, {3: 0.4}, {2: 0.3, 3: 0.5}, {0: 0.2, 1: 0.6}])
def test_lost_workers_late_workers_and_lost_patience_leave_nothing_open(tmp_path, losses_s):
    engine = replace(EngineSettings(), num_gpu_blocks_override=200, max_model_len=2000, max_num_batched_tokens=512)
    deployment = disaggregated(
        engine, kv_transfer_bandwidth=2.0, losses_s=losses_s, starts_s={1: 0.3}, migration_limit=1
    )
    results, trace = trace_of(
        tmp_path / "t.json",
        deployment,
        isl=900,
        osl=60,
        request_rate=60,
        request_count=80,
        request_cancellation_rate=30,
        request_cancellation_delay=0.35,
    )
    check(trace)
    assert results.num_cancelled
    statuses = {request.args["status"] for request in trace.requests}
    assert statuses == {"finished", "cancelled"}
    for pid in trace.names:
        for name in ("requests", "KV blocks"):
            assert not trace.counters or not any(trace.counters[pid, name][-1][1].values()), "all is over"


def test_ten_thousand_requests_take_as_many_lanes_as_are_under_way(tmp_path):
    _, trace = trace_of(tmp_path / "t.json.gz", ONE_WORKER, isl=16, osl=2, concurrency=32, request_count=10_000)
    assert len(trace.requests) == 10_000
    assert trace.num_lanes == 32


def test_the_same_seed_gives_the_same_bytes_packed_or_not(tmp_path):
    load = {"isl": 100, "isl_stddev": 30, "osl": 30, "osl_stddev": 9, "request_rate": 50, "request_count": 300}
    packed = []
    for name in ("one.json.gz", "other.json.gz", "plain.json"):
        trace_of(tmp_path / name, replace(ONE_WORKER, data_parallel_size=2), **load)
        packed.append((tmp_path / name).read_bytes())
    assert packed[0] == packed[1]
    assert gzip.decompress(packed[0]) == packed[2]
    assert len(packed[2].split(b"\n")) > _BATCH, "more than is written at once"


def test_a_data_parallel_rank_is_a_process_of_its_own(tmp_path):
    _, trace = trace_of(
        tmp_path / "t.json", replace(ONE_WORKER, data_parallel_size=2), isl=10, osl=4, concurrency=4, request_count=8
    )
    assert [name.rsplit(",", 1)[0] for name in trace.names.values()] == [
        "worker 0, dp rank 0, agg",
        "worker 0, dp rank 1, agg",
    ]
    assert Counter(request.pid for request in trace.requests) == {1: 4, 2: 4}


def test_memory_does_not_grow_with_requests(path):
    trace = TraceEvents(path, ONE_WORKER)
    observer = trace.observer_of(0, 0)
    tracemalloc.start()
    for number in range(10_000):
        flight = Flight(SequenceState(Request(str(number), 100, 10)), number * 0.1, None)
        observer.arrived(flight)
        observer.prefilling(flight, number * 0.1, 100)
        observer.prefilled(flight, number * 0.1 + 0.05)
        observer.left(flight, number * 0.1 + 0.1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    trace.close()
    assert peak < 1e6


def test_an_error_in_the_simulation_leaves_a_whole_file(tmp_path):
    trace = TraceEvents(tmp_path / "t.json", ONE_WORKER)

    def interrupt(num_ended, _):
        if num_ended == 512:
            raise KeyboardInterrupt

    load = Workload(isl=100, osl=20, concurrency=8, request_count=1000)
    try:
        with pytest.raises(KeyboardInterrupt):
            simulate(SimulationSettings(ONE_WORKER, load), observer_of=trace.observer_of, on_progress=interrupt)
    finally:
        trace.close()
    trace = read(tmp_path / "t.json")
    check(trace)
    assert Counter(request.args["status"] for request in trace.requests)["finished"] == 512


def test_a_simulation_that_never_began_leaves_an_empty_trace(tmp_path):
    TraceEvents(tmp_path / "t.json", ONE_WORKER).close()
    assert read(tmp_path / "t.json").requests == []


def test_a_file_that_cannot_be_written_is_said_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot write the timeline to .*: No such file.*Name another file"):
        TraceEvents(tmp_path / "nowhere" / "t.json", ONE_WORKER)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_a_disk_that_is_full_is_said_at_once():
    with pytest.raises(ConfigError, match=r"cannot write the timeline to /dev/full: No space left.*Name another file"):
        TraceEvents(Path("/dev/full"), ONE_WORKER)


@pytest.mark.parametrize("num_engines", [1, 600])
def test_a_disk_that_becomes_full_is_one_error(tmp_path, monkeypatch, num_engines):
    trace = TraceEvents(tmp_path / "t.json", ONE_WORKER)
    full = FullDisk()
    trace._file._file.close()
    monkeypatch.setattr(trace._file, "_file", full)
    for _ in range(num_engines):
        observer = trace.observer_of(0, 0)
    with pytest.raises(ConfigError, match=r"cannot write the timeline to .*t.json: No space left.*Name another file"):
        end(observer, trace)
    assert full.closed
    trace.close()


def end(observer, trace):
    """What may be the first to write: the next event, or the end."""
    observer.steps_done(Stretch(np.array([0.0, 1.0]), 1, 0, 1, 0, 1, 1), 10)
    trace.close()


class FullDisk(io.RawIOBase):
    def writable(self):
        return True

    def write(self, _):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
