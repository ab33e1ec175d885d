"""
A run again, with a profile in the place of the server: the product's own scheduler and step times, without jitter.

    replayed = replay(profile, run)
    replayed.ttft_s, replayed.itl_s        of each request
    replayed.steps                         all passes, with their loads

Requests are laid into slots: one follows the request of the slot that ended last before it started, after the
pause that was recorded. So a closed loop stays one and an open one nearly so, and a replay does not run
away when the profile is still slower than the server: a request never overtakes the one that it waited for.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mock_engine.drive_virtual import Flight, Stretch, VirtualClock, VirtualDrive
from mock_engine.engine_settings import make_engine
from mock_engine.errors import ConfigError, RequestError
from mock_engine.profile import Profile
from mock_engine.profile_fit.observed import SAME_MOMENT_S, ObservedRun
from mock_engine.request import Request
from mock_engine.step import StepLoad
from mock_engine.step_times import StepTimes
from mock_engine.timing import StepJitter, TimingModel

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

MAX_REQUESTS = 400  # of a run that are replayed


class Steps(NamedTuple):
    """Passes in order. Decode passes in a row are one entry, with the load of the middle one."""

    loads: list[StepLoad]
    counts: IntArray  # passes of that load
    start_s: FloatArray
    end_s: FloatArray


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of the first requests of a run, shape (requests,) each."""

    run: ObservedRun
    ttft_s: FloatArray
    itl_s: FloatArray  # NaN for one token
    queued_s: FloatArray  # when it reached the engine's queue
    first_token_s: FloatArray
    last_token_s: FloatArray
    is_compared: NDArray[np.bool_]  # answered, in the run, before the last of these requests was sent
    steps: Steps

    @property
    def values(self) -> dict[str, FloatArray]:
        """By metric, as `observations.observed_values` has those of the run."""
        return {"ttft": self.ttft_s, "itl": self.itl_s}


class Plan(NamedTuple):
    """When which request is sent: the slots of a run, laid out once for all its replays."""

    slots: list[list[tuple[int, float]]]  # request and pause before it; of the first, its start
    waiting: list[int]  # requests that are sent as slots become free
    num_requests: int
    is_compared: NDArray[np.bool_]


def plan_replay(run: ObservedRun, max_requests: int = MAX_REQUESTS) -> Plan:
    """
    Lay out the first `max_requests` of a run, or twice as many as were under way at once: of fewer, none might have
    ended before the last was sent, and those alone are compared.
    """
    requests = run.requests[: max(max_requests, 2 * run.concurrency)]
    num_requests = len(requests)
    is_whole = num_requests == len(run.requests)
    compared = np.ones(num_requests, dtype=np.bool_)
    if requests[0].start_s is None:
        if not is_whole:
            compared[num_requests - run.concurrency :] = num_requests <= run.concurrency
        first = [[(index, 0.0)] for index in range(min(run.concurrency, num_requests))]
        return Plan(first, list(range(len(first), num_requests)), num_requests, compared)
    slots: list[list[tuple[int, float]]] = []
    ends_s: list[tuple[float, int]] = []  # of each slot's last request, ascending
    origin_s = requests[0].start_s
    for index, request in enumerate(requests):
        assert request.start_s is not None
        start_s = request.start_s - origin_s
        before = bisect_right(ends_s, (start_s + SAME_MOMENT_S, len(slots)))
        if before:
            ended_s, slot = ends_s.pop(before - 1)
            slots[slot].append((index, _pause_s(start_s - ended_s)))
        else:
            slot = len(slots)
            slots.append([(index, start_s)])
        insort(ends_s, (start_s + request.latency_s, slot))
    if not is_whole:
        last_start_s = requests[-1].start_s or 0.0
        compared &= np.array([(r.start_s or 0.0) + r.latency_s <= last_start_s for r in requests])
    return Plan(slots, [], num_requests, compared)


def _pause_s(between_s: float) -> float:
    """A pause; none where rounding made one: a request that comes just after a pass began waits until it is over."""
    return between_s if between_s > SAME_MOMENT_S else 0.0


def replay(
    profile: Profile, run: ObservedRun, *, timing: TimingModel | None = None, plan: Plan | None = None
) -> Replay:
    """
    Send the requests of `run` to an engine of `profile`. Raises `ConfigError` if one can never be served there.

    `timing` and `plan`, if they are at hand, save making them again.
    """
    plan = plan or plan_replay(run)
    return _Replaying(profile, run, timing or TimingModel(profile), plan).result()


class _RecordedTimes(StepTimes):
    """Step times that remember for which loads they were asked, in the order of the steps."""

    def __init__(self, timing: TimingModel) -> None:
        super().__init__(timing, StepJitter(0.0, 0))
        self.loads: list[StepLoad] = []
        self.counts: list[int] = []
        self._peeked: StepLoad | None = None

    def step_s(self, load: StepLoad) -> float:
        self.loads.append(load)
        self.counts.append(1)
        return super().step_s(load)

    def peek_decode_s(self, load: StepLoad, num_steps: int) -> FloatArray:
        self._peeked = load
        return super().peek_decode_s(load, num_steps)

    def skip(self, num_steps: int) -> None:
        assert self._peeked is not None
        batch_size = self._peeked.decode_batch_size
        middle = self._peeked.context_tokens + batch_size * (num_steps - 1) // 2
        self.loads.append(StepLoad((), batch_size, middle))
        self.counts.append(num_steps)
        super().skip(num_steps)


class _Replaying:
    """One engine, its clients, and what is written down of both; the listener of the drive."""

    def __init__(self, profile: Profile, run: ObservedRun, timing: TimingModel, plan: Plan) -> None:
        self._run = run
        self._plan = plan
        self._times = _RecordedTimes(timing)
        self._profile = profile
        engine = make_engine(replace(run.engine, enable_prefix_caching=False), profile, self._times)
        self._clock = VirtualClock()
        self._drive = VirtualDrive(self._clock, engine.core, self)
        self._max_model_len = engine.scheduler.max_model_len
        self._slots = [deque(slot) for slot in plan.slots]
        self._waiting = deque(plan.waiting)
        self._sent_s = np.zeros(plan.num_requests)
        self._queued_s = np.zeros(plan.num_requests)
        self._flights: list[Flight | None] = [None] * plan.num_requests
        self._edges_s: list[tuple[float, float]] = []

    def result(self) -> Replay:
        for slot in self._slots:
            self._send_after(slot.popleft(), slot, 0.0)
        self._clock.run()
        flights = self._flights
        first_s = np.array([flight.first_token_s for flight in flights if flight], dtype=np.float64)
        last_s = np.array([flight.last_token_s for flight in flights if flight], dtype=np.float64)
        osl_tokens = np.array([request.osl_tokens for request in self._run.requests[: len(flights)]])
        gaps = np.where(osl_tokens > 1, osl_tokens - 1.0, np.nan)
        edges_s = np.array(self._edges_s)
        assert len(edges_s) == len(self._times.loads), "each stretch of steps is asked for once"
        return Replay(
            self._run,
            first_s - self._sent_s,
            (last_s - first_s) / gaps,
            self._queued_s,
            first_s,
            last_s,
            self._plan.is_compared,
            Steps(self._times.loads, np.array(self._times.counts), edges_s[:, 0], edges_s[:, 1]),
        )

    def _send_after(self, following: tuple[int, float], slot: deque[tuple[int, float]], now_s: float) -> None:
        index, pause_s = following
        self._sent_s[index] = now_s + pause_s
        request = self._run.requests[index]
        at_s = now_s + pause_s + self._profile.overhead_before_queue_s(request.isl_tokens)
        self._queued_s[index] = at_s
        if at_s > now_s:
            self._clock.call_at(at_s, lambda _: self._submit(index, slot))
        else:
            self._submit(index, slot)

    def _submit(self, index: int, slot: deque[tuple[int, float]]) -> None:
        asked = self._run.requests[index]
        request = Request(
            str(index), asked.isl_tokens, asked.osl_tokens, num_remote_tokens=asked.isl_tokens - asked.new_tokens
        )
        try:
            self._flights[index] = self._drive.submit(request, slot)
        except RequestError as error:
            raise ConfigError(f"{self._run.name}: {self._profile.name} can never serve a request: {error}") from error

    def finished(self, flight: Flight) -> None:
        slot: deque[tuple[int, float]] = flight.owner
        if slot:
            self._send_after(slot.popleft(), slot, self._clock.now)
        elif self._waiting:
            self._send_after((self._waiting.popleft(), 0.0), slot, self._clock.now)

    def steps_done(self, stretch: Stretch) -> None:
        self._edges_s.append((float(stretch.edges_s[0]), float(stretch.edges_s[-1])))

    def gap_done(self, gap_s: float, num_sequences: int) -> None:
        """Single gaps are of no interest here."""


def visited(replays: Sequence[Replay]) -> dict[StepLoad, int]:
    """The loads of all passes, and how many passes had each."""
    found: dict[StepLoad, int] = {}
    for replayed in replays:
        for load, count in zip(replayed.steps.loads, replayed.steps.counts.tolist(), strict=True):
            found[load] = found.get(load, 0) + count
    return found
