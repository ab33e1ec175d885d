"""
The engine in virtual time, on simpy.

    clock = VirtualClock()
    drive = VirtualDrive(clock, core, listener)
    clock.call_at(0.5, lambda: drive.submit(request))
    clock.run()

Time jumps from one event to the next, and while the running batch cannot change, all
its decode steps up to the next sequence's end are one event. What comes between them (an
arrival that might be admitted, a cancel) cuts the run at the step that is then under way.
Times are those of single steps, to the last bit; `is_single_stepping` makes them so, for tests.

At one moment, the order is: what the outside does, steps that end, steps that begin. So
whatever arrives at the moment when a step begins is in time for it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from heapq import heappush
from typing import Any, NamedTuple, Protocol

import numpy as np
import simpy
from numpy.typing import NDArray

from mock_engine.core import Core, Run, Step
from mock_engine.request import Request
from mock_engine.scheduler import Progress, ScheduledPrefill
from mock_engine.sequence import SequenceState, Status

OUTSIDE, STEP_ENDS, STEP_BEGINS = 1, 2, 3  # 1 is what simpy gives its own timeouts and processes


class VirtualClock(simpy.Environment):
    """simpy's environment, and calls at absolute times: `now + delay` would round."""

    def call_at(self, time_s: float, function: Callable[[simpy.Event], None], priority: int = OUTSIDE) -> simpy.Event:
        """Let `function` be called with the returned event when it is `time_s`."""
        assert time_s >= self._now, "time never runs back"
        event = simpy.Event(self)
        event._ok = True
        event._value = None
        event.callbacks = [function]
        heappush(self._queue, (time_s, priority, next(self._eid), event))  # type: ignore[misc]
        return event


class Flight:
    """One request in an engine: when what happened to it. Times are None until then."""

    __slots__ = ("arrival_s", "first_token_s", "last_token_s", "owner", "second_token_s", "sequence")

    def __init__(self, sequence: SequenceState, arrival_s: float, owner: Any) -> None:
        self.sequence = sequence
        self.owner = owner  # whatever the submitter wants to find here again
        self.arrival_s = arrival_s
        self.first_token_s: float | None = None
        self.second_token_s: float | None = None
        self.last_token_s: float | None = None  # kept where it is of use: at the end, and from a preemption to the next


class Stretch(NamedTuple):
    """What steps in a row had in common."""

    edges_s: NDArray[np.float64]  # begin of the first, then the end of each
    num_decoding: int  # sequences that got a token at the end of each step, after one at its begin
    num_joining: int  # sequences that got one at the end of the last step, and had none at its begin
    num_running: int
    num_waiting: float  # mean over the time from the first edge to the last
    start_blocks: int  # KV blocks in use, in the first step
    end_blocks: int  # ... and in the last
    num_extra_tokens: int = 0  # that came with these tokens: draft tokens that were accepted


class Listener(Protocol):
    """Who wants to know what happens in a drive. `flight.owner` says whom it is about."""

    def finished(self, flight: Flight) -> None:
        """All its tokens are out; its blocks are back, unless its request keeps them."""

    def steps_done(self, stretch: Stretch) -> None:
        """Steps in a row are over; whoever finished with them is not reported yet."""

    def gap_done(self, gap_s: float, num_sequences: int) -> None:
        """So many sequences got their next token after more than a step: a preemption, or steps without decodes."""


class Observer(Protocol):
    """Who draws a picture of a drive. What is said of one flight comes in the order of time."""

    def arrived(self, flight: Flight) -> None:
        """It waits from now on."""

    def prefilling(self, flight: Flight, start_s: float, num_new: int) -> None:
        """A step begins that computes `num_new` tokens of it."""

    def prefilled(self, flight: Flight, now_s: float) -> None:
        """That step is over. Unless it made a token, there are more to come."""

    def preempted(self, flight: Flight, now_s: float) -> None:
        """It waits again."""

    def left(self, flight: Flight, now_s: float) -> None:
        """It is finished or cancelled."""

    def sending(self, flight: Flight, now_s: float, num_bytes: int) -> None:
        """It is finished, and its KV cache begins to go to another worker."""

    def sent(self, flight: Flight, now_s: float) -> None:
        """Its KV cache is no longer kept, whether it was sent or not."""

    def steps_done(self, stretch: Stretch, num_blocks: int) -> None:
        """
        Steps in a row are over. There are `num_blocks` KV blocks in all.

        A stretch of no step, with one edge, says what it is like from then on, while none is under way.
        """


class VirtualDrive:
    """Paces a core by a virtual clock."""

    def __init__(
        self,
        clock: VirtualClock,
        core: Core,
        listener: Listener,
        observer: Observer | None = None,
        is_single_stepping: bool = False,
    ) -> None:
        self.core = core
        self.flights: dict[SequenceState, Flight] = {}
        self._clock = clock
        self._listener = listener
        self._observer = observer
        self._is_single_stepping = is_single_stepping
        self._run: Run | None = None
        self._step: Step | None = None
        self._start_s = 0.0  # of the step or run under way
        self._used_blocks = 0  # in the step under way
        self._waiting_s = 0.0  # of all that waited since the step or run began, together...
        self._waiting_until_s = 0.0  # ...up to here
        self._next: simpy.Event | None = None  # the end of the step or run, or the begin of one; None when idle
        self._arrived: deque[Flight] = deque()  # too late for the next step
        self._wanting: dict[Flight, Callable[[], None]] = {}  # who waits for blocks before it is queued
        self._expecting_second: list[Flight] = []  # their first token came out since the last decode step
        # Those that decode and got no token at the last step's end, since it only prefilled: when they got their last.
        self._stalled: dict[SequenceState, float] = {}

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return self.core.scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that are not in the batch."""
        return len(self.core.scheduler.waiting) + len(self._arrived)

    def submit(self, request: Request, owner: Any = None) -> Flight:
        """Queue a request that arrives now. Raises `RequestError` if it can never be served."""
        flight = self.prepare(request, owner)
        self.enqueue(flight)
        return flight

    def prepare(self, request: Request, owner: Any = None) -> Flight:
        """The request, not queued yet: that is up to `enqueue`. Raises `RequestError` if it can never be served."""
        return Flight(self.core.prepare(request), self._clock.now, owner)

    def want(self, flight: Flight, on_reserved: Callable[[], None]) -> None:
        """
        Let it have the KV blocks of its prompt before it is queued, first come, first served.

        `on_reserved` is called when it has them, at once if it can have them now; never once it is cancelled.
        """
        self._wanting[flight] = on_reserved
        if self._run is not None:
            self._cut_run()
        self._reserve()

    @property
    def wanting(self) -> tuple[Flight, ...]:
        """Who waits for that."""
        return tuple(self._wanting)

    def _reserve(self) -> None:
        while self._wanting:
            flight = next(iter(self._wanting))
            if not self.core.reserve(flight.sequence):
                return
            self._wanting.pop(flight)()

    def enqueue(self, flight: Flight) -> None:
        """Queue what has been prepared; it arrives now."""
        if self._run is not None and (self.core.scheduler.has_room or flight.sequence in self.core.scheduler.reserved):
            self._cut_run()
        self._count_waiting(self._clock.now)
        flight.arrival_s = self._clock.now
        self._arrived.append(flight)
        self.flights[flight.sequence] = flight
        if self._observer is not None:
            self._observer.arrived(flight)
        if self._next is None:
            self._begin_soon()

    def cancel(self, flight: Flight) -> None:
        """Forget a request; its KV blocks are back when this returns. A no-op once it has ended."""
        if flight.sequence.status is Status.NEW and flight.sequence not in self.flights:  # prepared, and no more
            self._withdraw_prepared(flight)
            return
        if self.flights.pop(flight.sequence, None) is None:
            return
        if self._run is not None:
            self._cut_run()
        self._count_waiting(self._clock.now)
        if flight in self._arrived:
            self._arrived.remove(flight)
        self.core.cancel(flight.sequence)
        self._stalled.pop(flight.sequence, None)
        if self._observer is not None:
            self._observer.left(flight, self._clock.now)

    def give_back(self, flight: Flight) -> None:
        """Take the KV blocks back of a finished request that keeps them."""
        if self._run is not None:
            self._cut_run()
        self.core.scheduler.give_back(flight.sequence)
        if self._next is None:
            self._begin_soon()

    def _withdraw_prepared(self, flight: Flight) -> None:
        self._wanting.pop(flight, None)
        if self._run is not None:
            self._cut_run()
        self.core.cancel(flight.sequence)
        if self._next is None:
            self._begin_soon()

    def _begin_soon(self) -> None:
        self._next = self._clock.call_at(self._clock.now, self._begin, STEP_BEGINS)

    def _begin_next(self) -> None:
        """A step has ended: begin the next, once all else that happens at this moment has."""
        if self._clock.peek() > self._clock.now:  # nothing else does
            self._begin()
        else:
            self._begin_soon()

    def _begin(self, _: simpy.Event | None = None) -> None:
        now_s = self._start_s = self._clock.now
        self._count_waiting(now_s)
        self._hand_over_arrived()
        self._reserve()
        # Steps of a run are like the last one: all that decode got a token then.
        if not self._is_single_stepping and not self._arrived and not self._stalled:
            self._run = self.core.plan_run(now_s)
            if self._run is not None:
                self._next = self._clock.call_at(float(self._run.edges_s[-1]), self._end_run, STEP_ENDS)
                return
        self._begin_step(now_s)

    def _hand_over_arrived(self) -> None:
        limit_s = self.core.admission_limit_s
        while self._arrived and self._arrived[0].arrival_s <= limit_s:
            self.core.enqueue(self._arrived.popleft().sequence)

    def _begin_step(self, start_s: float) -> None:
        num_preemptions = self.core.scheduler.num_preemptions
        self._start_s = start_s
        self._step = self.core.begin_step()
        if self.core.scheduler.num_preemptions > num_preemptions:
            for sequence in self.core.scheduler.preempted:
                self._note_preemption(sequence)
        self._used_blocks = self.core.scheduler.blocks.num_used
        if self._observer is not None:
            self._show_begin(self._observer)
        if self._step is None:
            self._next = None
            return
        self._next = self._clock.call_at(start_s + self._step.seconds, self._end_step, STEP_ENDS)

    def _note_preemption(self, sequence: SequenceState) -> None:
        flight = self.flights[sequence]
        last_token_s = self._stalled.pop(sequence, self._start_s)
        if sequence.num_output_tokens and flight.last_token_s is None:  # unless none came since it was preempted before
            flight.last_token_s = last_token_s
        if self._observer is not None:
            self._observer.preempted(flight, self._start_s)

    def _end_step(self, event: simpy.Event) -> None:
        if event is not self._next:
            return
        assert self._step is not None
        step, self._step = self._step, None
        now_s = self._clock.now
        scheduler = self.core.scheduler
        num_decoding, num_running = len(scheduler.decoding), scheduler.num_running
        has_decodes, num_stalled = step.schedule.has_decodes, len(self._stalled)
        if not has_decodes:
            self._stalled = dict.fromkeys(scheduler.decoding, self._start_s) | self._stalled
        progress = self.core.end_step(step, now_s)
        self._note_steps(
            Stretch(
                np.array([self._start_s, now_s]),
                num_decoding - num_stalled if has_decodes else 0,
                len(progress.prefilled) + (num_stalled if has_decodes else 0),
                num_running,
                self._mean_waiting(now_s),
                self._used_blocks,
                self._used_blocks,
                progress.num_extra_tokens,
            )
        )
        if has_decodes:
            self._note_decodes(now_s)
        if self._observer is not None:
            self._show_end(self._observer, step.schedule.prefills)
        for sequence in progress.prefilled:
            self._note_prefilled(self.flights[sequence], now_s)
        self._finish(progress, now_s)
        self._begin_next()

    def _count_waiting(self, now_s: float) -> None:
        """Whoever joins or leaves the queue says so first."""
        if now_s > self._waiting_until_s:
            self._waiting_s += self.num_waiting * (now_s - self._waiting_until_s)
            self._waiting_until_s = now_s

    def _mean_waiting(self, end_s: float) -> float:
        """How many waited while the steps ran that end now."""
        self._count_waiting(end_s)
        mean, self._waiting_s = self._waiting_s / (end_s - self._start_s), 0.0
        return mean

    def _note_steps(self, stretch: Stretch) -> None:
        self._listener.steps_done(stretch)
        if self._observer is not None:
            self._observer.steps_done(stretch, self.core.scheduler.blocks.num_blocks)

    def _note_decodes(self, now_s: float) -> None:
        """All that decode got a token."""
        for flight in self._expecting_second:
            if flight.sequence.num_output_tokens > 1 and flight.second_token_s is None:  # not preempted or cancelled
                flight.second_token_s = now_s
        self._expecting_second.clear()
        if self._stalled:
            for last_s, num_sequences in Counter(self._stalled.values()).items():
                self._listener.gap_done(now_s - last_s, num_sequences)
            self._stalled.clear()

    def _note_prefilled(self, flight: Flight, now_s: float) -> None:
        if flight.first_token_s is None:
            flight.first_token_s = now_s
            self._expecting_second.append(flight)
            return
        if flight.second_token_s is None:
            flight.second_token_s = now_s
        assert flight.last_token_s is not None, "it was preempted"
        self._listener.gap_done(now_s - flight.last_token_s, 1)
        flight.last_token_s = None

    def _show_begin(self, observer: Observer) -> None:
        if self._step is not None:
            for sequence, num_new in self._step.schedule.prefills:
                observer.prefilling(self.flights[sequence], self._start_s, num_new)
            return
        scheduler, used_blocks = self.core.scheduler, self._used_blocks
        idle = Stretch(np.array([self._start_s]), 0, 0, 0, self.num_waiting, used_blocks, used_blocks)
        observer.steps_done(idle, scheduler.blocks.num_blocks)

    def _show_end(self, observer: Observer, prefills: list[ScheduledPrefill]) -> None:
        for sequence, _ in prefills:
            if sequence.status is not Status.CANCELLED:
                observer.prefilled(self.flights[sequence], self._clock.now)

    def _finish(self, progress: Progress, now_s: float) -> None:
        for sequence in progress.finished:
            flight = self.flights.pop(sequence)
            flight.last_token_s = now_s
            if self._observer is not None:
                self._observer.left(flight, now_s)
            self._listener.finished(flight)

    def _end_run(self, event: simpy.Event) -> None:
        if event is not self._next:
            return
        assert self._run is not None
        run, self._run = self._run, None
        self._finish(self._count_run(run, run.num_steps), self._clock.now)
        self._begin_next()

    def _count_run(self, run: Run, num_steps: int) -> Progress:
        scheduler = self.core.scheduler
        num_decoding, used_blocks = len(scheduler.decoding), scheduler.blocks.num_used
        grown_blocks = scheduler.num_blocks_for_steps(num_steps)
        progress = self.core.end_run(run, num_steps)
        self._note_steps(
            Stretch(
                run.edges_s[: num_steps + 1],
                num_decoding,
                0,
                num_decoding,
                self._mean_waiting(float(run.edges_s[num_steps])),
                used_blocks,
                used_blocks + grown_blocks,
            )
        )
        self._note_decodes(float(run.edges_s[1]))
        return progress

    def _cut_run(self) -> None:
        """Leave it at the step that is under way now: those before are over, and it is an ordinary step."""
        assert self._run is not None
        run, self._run = self._run, None
        num_over = int(run.edges_s.searchsorted(self._clock.now)) - 1
        if num_over > 0:
            self._count_run(run, num_over)
        self._begin_step(float(run.edges_s[max(num_over, 0)]))
