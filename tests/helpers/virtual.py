"""A drive in virtual time whose every token is written down, and random workloads for it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import strategies as st

from mock_engine.core import Core
from mock_engine.drive_virtual import VirtualClock, VirtualDrive
from mock_engine.request import Request
from tests.helpers.workloads import BLOCK_SIZE, MAX_MODEL_LEN, TICK_S, make_core


class TokenCore(Core):
    """Notes when each token of each request came out."""

    def note(self, sequences, now_s):
        for sequence in sequences:
            self.token_s.setdefault(sequence.request.request_id, []).append(float(now_s))

    def end_step(self, step, now_s):
        decoding = list(self.scheduler.decoding) if step.schedule.has_decodes else []
        made_before = [sequence.num_output_tokens for sequence in decoding]
        progress = super().end_step(step, now_s)
        for sequence, made in zip(decoding, made_before, strict=True):
            self.note([sequence] * (sequence.num_output_tokens - made), now_s)
        self.note(progress.prefilled, now_s)
        return progress

    def end_run(self, run, num_steps):
        for now_s in run.edges_s[1 : num_steps + 1]:
            self.note(self.scheduler.decoding, now_s)
        self.num_run_steps += num_steps
        return super().end_run(run, num_steps)


class Notes:
    """A listener that keeps everything."""

    def __init__(self):
        self.flights = []
        self.gaps = []
        self.num_tokens = 0
        self.waiting_s = 0.0

    def finished(self, flight):
        self.flights.append(
            (
                flight.sequence.request.request_id,
                flight.arrival_s,
                flight.first_token_s,
                flight.second_token_s,
                flight.last_token_s,
                flight.sequence.num_cached_tokens,
                flight.sequence.num_preemptions,
            )
        )

    def steps_done(self, stretch):
        for start_s, end_s in pairwise(stretch.edges_s.tolist()):
            self.gaps += [end_s - start_s] * stretch.num_decoding
        self.num_tokens += stretch.num_decoding * (len(stretch.edges_s) - 1) + stretch.num_joining
        self.num_tokens += stretch.num_extra_tokens
        self.waiting_s += stretch.num_waiting * float(stretch.edges_s[-1] - stretch.edges_s[0])

    def gap_done(self, gap_s, num_sequences):
        self.gaps += [gap_s] * num_sequences


class WaitObserver:
    """Adds up for how long each request waits, from arrival or preemption until it is computed or leaves."""

    def __init__(self):
        self.since_s = {}
        self.waiting_s = 0.0

    def arrived(self, flight):
        self.since_s[flight] = flight.arrival_s

    def prefilling(self, flight, start_s, _num_new):
        self.left(flight, start_s)

    def preempted(self, flight, now_s):
        self.since_s[flight] = now_s

    def left(self, flight, now_s):
        self.waiting_s += now_s - self.since_s.pop(flight, now_s)

    def prefilled(self, flight, now_s):
        pass

    def steps_done(self, stretch, num_blocks):
        pass


@dataclass(frozen=True)
class TimedRequest:
    request: Request
    arrival_s: float
    cancel_s: float | None


@st.composite
def timed_requests(draw: st.DrawFn, max_requests: int = 14) -> list[TimedRequest]:
    """Requests with shared prefixes, some cancelled; steps take about 5 ms, so 0.3 s is what one request takes."""
    result = []
    for number in range(draw(st.integers(1, max_requests))):
        isl = draw(st.integers(1, MAX_MODEL_LEN - 1))
        osl = draw(st.integers(1, MAX_MODEL_LEN - isl))
        family = draw(st.integers(0, 2))
        shared = draw(st.integers(0, isl // BLOCK_SIZE))
        num_hashes = draw(st.sampled_from([0, isl // BLOCK_SIZE, (isl + osl) // BLOCK_SIZE]))
        hashes = [family * 100 + i if i < shared else 1000 * (number + 1) + i for i in range(num_hashes)]
        moments = st.just(0.0) | st.integers(0, 100).map(lambda ticks: ticks * TICK_S) | st.floats(0, 0.4)
        arrival_s = draw(moments)
        cancel_s = draw(st.none() | st.none() | moments)
        result.append(
            TimedRequest(
                Request(f"r{number}", isl, osl, hashes, priority=draw(st.integers(-1, 1))),
                arrival_s,
                None if cancel_s is None else arrival_s + cancel_s,
            )
        )
    return result


def drive(workload, is_single_stepping, jitter, **options):
    """Run it; returns the tokens' times by request, what the listener heard, and the core."""
    plain = make_core(jitter=jitter, **options)
    core = TokenCore(plain.scheduler, plain._times, plain._is_async)
    core.token_s = {}
    core.num_run_steps = 0
    clock, notes, observer = VirtualClock(), Notes(), WaitObserver()
    virtual = VirtualDrive(clock, core, notes, observer, is_single_stepping)

    pending = sorted(workload, key=lambda timed: timed.arrival_s)

    def arrive(_):
        """As in `Clients`, each arrival is an event only once the one before has happened."""
        timed = pending.pop(0)
        flight = virtual.submit(timed.request)
        if timed.cancel_s is not None:
            # Decided half way there: an event that is older than a step's end, and younger than a run's.
            half_way_s = (timed.arrival_s + timed.cancel_s) / 2
            clock.call_at(half_way_s, lambda _: clock.call_at(timed.cancel_s, lambda _: virtual.cancel(flight)))
        if pending:
            clock.call_at(pending[0].arrival_s, arrive)

    clock.call_at(pending[0].arrival_s, arrive)
    clock.run()
    assert not virtual.flights
    assert notes.waiting_s == pytest.approx(observer.waiting_s, abs=1e-9)
    return core, notes
