"""
A simulation as a picture to look into: what each engine did for each request, and when.

    trace = TraceEvents(Path("timeline.json.gz"), settings.deployment)
    try:
        simulate(settings, observer_of=trace.observer_of)
    finally:
        trace.close()

The file is Chrome's Trace Event Format, which ui.perfetto.dev and chrome://tracing open. Each engine is a
process of it. A thread is a lane that one request has at a time: a span for all of the request, and within that

    queue         until its first step begins
    prefill       one a chunk: the tokens computed, and those before them whose KV was there
    decode        from its first token, or the first after a preemption, to its last; `tokens` came in between
    preempted     it waits again
    KV kept       its prompt is computed, and its KV cache waits for a link to a decode worker
    KV transfer   ... and is on its way there

Times are whole microseconds, so that no reader's rounding makes neighbours overlap. Spans are begin and end events:
a complete one ("X") would come before the begin of what encloses it where both begin at once, since Perfetto sorts
by duration (its trace_sorter.h), and Perfetto looks threads up by `tid` alone, which no two processes share here.
Nothing is held in memory but what is under way.
"""

from __future__ import annotations

import json
from heapq import heappop, heappush
from itertools import count
from pathlib import Path

import numpy as np

from mock_engine.deployment import DeploymentSettings
from mock_engine.drive_virtual import Flight, Observer, Stretch
from mock_engine.event_file import EventFile
from mock_engine.sequence import Status


class TraceEvents:
    """Writes `path`, packed if its name ends in .gz. Raises `ConfigError` if it cannot be written."""

    def __init__(self, path: Path, deployment: DeploymentSettings) -> None:
        self._file = EventFile(path)
        self._groups = [group for group in deployment.groups for _ in range(group.num_workers)]
        self._is_parallel = deployment.data_parallel_size > 1
        self._ids = count(1)  # of processes and threads: no two have the same
        self._engines: list[_EngineTrace] = []

    def observer_of(self, worker: int, dp_rank: int) -> Observer:
        """Who writes down what this engine does; asked for once each."""
        group = self._groups[worker]
        name = f"worker {worker}{f', dp rank {dp_rank}' if self._is_parallel else ''}"
        engine = _EngineTrace(self._file, self._ids, f"{name}, {group.role}, {group.engine.profile}")
        self._engines.append(engine)
        return engine

    def close(self) -> None:
        """End what is under way, as after an interrupt, and write it all out. Safe twice."""
        if not self._file.is_closed:
            for engine in self._engines:
                engine.close()
            self._file.close()


class _Lane:
    """Where a request is drawn, and the span of it that has begun."""

    __slots__ = ("args", "is_running", "num_tokens", "phase", "since_us", "tid")

    def __init__(self, tid: int, now_us: int) -> None:
        self.tid = tid
        self.phase = "queue"
        self.since_us = now_us
        self.args = ""
        self.is_running = False
        self.num_tokens = 0  # output tokens when it last began to decode


class _EngineTrace:
    """
    The observer of one engine.

    What it knows is changed right before the event of that is appended, with no call in between, after which CPython
    might look for an interrupt: so both have happened or neither has, and `close` ends just what has begun.
    """

    def __init__(self, file: EventFile, ids: count[int], name: str) -> None:
        self._file = file
        self._events = file.events
        self._ids = ids
        self._pid = next(ids)
        self._lanes: dict[Flight, _Lane] = {}
        self._free: list[int] = []  # a heap: the first lane that is free is taken again
        self._num_lanes = 0
        self._running = self._waiting = self._since_us = 0  # so many of both, since then
        self._shown = ""
        self._kv_percent: float | None = None
        self._name("process", f'"pid":{self._pid}', name, self._pid)

    def arrived(self, flight: Flight) -> None:
        now_us = self._file.moment(flight.arrival_s)
        lane = _Lane(self._take_lane(), now_us)
        self._count(now_us, 0, +1)
        request = flight.sequence.request
        args = f'{{"isl_tokens":{request.isl_tokens},"osl_tokens":{request.osl_tokens}}}'
        name = _json(f"request-{request.request_id}")
        event = f'{{"ph":"B","name":{name},{self._place(lane, now_us)},"args":{args}}}'
        self._lanes[flight] = lane
        self._events.append(event)

    def prefilling(self, flight: Flight, start_s: float, num_new: int) -> None:
        now_us = self._file.moment(start_s)
        lane = self._lanes[flight]
        if not lane.is_running:
            lane.is_running = True
            self._count(now_us, +1, -1)
        past_tokens = flight.sequence.num_computed_tokens
        self._begin(lane, now_us, "prefill", f'{{"new_tokens":{num_new},"past_tokens":{past_tokens}}}')

    def prefilled(self, flight: Flight, now_s: float) -> None:
        lane = self._lanes[flight]
        lane.num_tokens = flight.sequence.num_output_tokens
        self._begin(lane, self._file.moment(now_s), "decode")  # or the next chunk, which begins at the same moment

    def preempted(self, flight: Flight, now_s: float) -> None:
        now_us = self._file.moment(now_s)
        lane = self._lanes[flight]
        self._end_decode(flight, lane)
        self._begin(lane, now_us, "preempted")
        lane.is_running = False
        self._count(now_us, -1, +1)

    def left(self, flight: Flight, now_s: float) -> None:
        now_us = self._file.moment(now_s)
        lane = self._lanes[flight]
        self._end_decode(flight, lane)
        self._count(now_us, *((-1, 0) if lane.is_running else (0, -1)))
        if flight.sequence.request.keeps_blocks and flight.sequence.status is Status.FINISHED:
            self._begin(lane, now_us, "KV kept")
        else:
            self._end(flight, lane, now_us)

    def sending(self, flight: Flight, now_s: float, num_bytes: int) -> None:
        self._begin(self._lanes[flight], self._file.moment(now_s), "KV transfer", f'{{"bytes":{num_bytes}}}')

    def sent(self, flight: Flight, now_s: float) -> None:
        self._end(flight, self._lanes[flight], self._file.moment(now_s))

    def steps_done(self, stretch: Stretch, num_blocks: int) -> None:
        edges_s, to_percent = stretch.edges_s, 100 / num_blocks
        self._file.moment(float(edges_s[-1]))
        self._show_kv(float(edges_s[0]), round(stretch.start_blocks * to_percent, 1))
        if stretch.end_blocks > stretch.start_blocks:
            blocks = np.linspace(stretch.start_blocks, stretch.end_blocks, len(edges_s) - 1)
            percent = np.round(blocks * to_percent, 1)
            for index in (np.flatnonzero(np.diff(percent)) + 1).tolist():
                self._show_kv(float(edges_s[index]), float(percent[index]))

    def close(self) -> None:
        """End all that is under way."""
        now_us = self._file.now_us
        for flight, lane in list(self._lanes.items()):
            self._end_decode(flight, lane)
            self._end(flight, lane, now_us)
        self._show_counts()

    def _begin(self, lane: _Lane, now_us: int, phase: str, args: str = "") -> None:
        """The lane's span ends, and the next begins. What took no time is not shown."""
        if now_us == lane.since_us:
            lane.phase, lane.args = phase, args
            return
        shown = f',"args":{lane.args}' if lane.args else ""
        begin = f'{{"ph":"B","name":"{lane.phase}",{self._place(lane, lane.since_us)}{shown}}}'
        both = f'{begin},\n{{"ph":"E",{self._place(lane, now_us)}}}'
        lane.phase, lane.since_us, lane.args = phase, now_us, args
        self._events.append(both)

    def _end_decode(self, flight: Flight, lane: _Lane) -> None:
        if lane.phase == "decode":
            lane.args = f'{{"tokens":{flight.sequence.num_output_tokens - lane.num_tokens}}}'

    def _end(self, flight: Flight, lane: _Lane, now_us: int) -> None:
        """The request is over, here at least, and its lane is free."""
        self._begin(lane, now_us, "over")
        sequence = flight.sequence
        args: dict[str, object] = {
            "status": sequence.status.value,
            "output_tokens": sequence.num_output_tokens,
            "cached_tokens": sequence.num_cached_tokens,
            "preemptions": sequence.num_preemptions,
        }
        if flight.first_token_s is not None:
            args["ttft_ms"] = round((flight.first_token_s - flight.arrival_s) * 1e3, 3)
        event = f'{{"ph":"E",{self._place(lane, now_us)},"args":{_json(args)}}}'
        heappush(self._free, lane.tid)
        del self._lanes[flight]
        self._events.append(event)

    def _place(self, lane: _Lane, at_us: int) -> str:
        return f'"pid":{self._pid},"tid":{lane.tid},"ts":{at_us}'

    def _take_lane(self) -> int:
        if self._free:
            return heappop(self._free)
        self._num_lanes += 1
        tid = next(self._ids)
        self._name("thread", f'"pid":{self._pid},"tid":{tid}', f"requests {self._num_lanes}", self._num_lanes)
        return tid

    def _count(self, now_us: int, running: int, waiting: int) -> None:
        """So many more run and wait from now on. Shown once time goes on: of one moment, the last counts."""
        if now_us > self._since_us:
            self._show_counts()
        self._since_us = now_us
        self._running += running
        self._waiting += waiting

    def _show_counts(self) -> None:
        counts = f'{{"running":{self._running},"waiting":{self._waiting}}}'
        if counts != self._shown:
            event = self._counter("requests", self._since_us, counts)
            self._shown = counts
            self._events.append(event)

    def _show_kv(self, at_s: float, percent: float) -> None:
        if percent != self._kv_percent:
            event = self._counter("KV blocks", self._file.moment(at_s), f'{{"used %":{percent}}}')
            self._kv_percent = percent
            self._events.append(event)

    def _counter(self, name: str, at_us: int, values: str) -> str:
        return f'{{"ph":"C","name":"{name}","pid":{self._pid},"ts":{at_us},"args":{values}}}'

    def _name(self, kind: str, ids: str, name: str, place: int) -> None:
        self._events.append(f'{{"ph":"M","name":"{kind}_name",{ids},"args":{{"name":{_json(name)}}}}}')
        self._events.append(f'{{"ph":"M","name":"{kind}_sort_index",{ids},"args":{{"sort_index":{place}}}}}')


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
