"""
The engine without a clock.

    sequence = core.prepare(request)
    core.enqueue(sequence)
    step = core.begin_step()         what runs now, and for how many seconds; None when idle
    ...a drive lets that much time pass...
    core.end_step(step, now_s)       what came of it
    core.cancel(sequence)            at any moment, also between the two

An engine that schedules asynchronously decides who is in a step when the one before it begins, so that
the GPU need not wait for the decision: a request that arrives while it is busy misses the next step.
Drives keep what arrived later than `admission_limit_s`, and hand it over another time.

A drive owns time and waiting; the core owns everything else. There are two:
`drive_realtime` (asyncio) and `drive_virtual` (simpy). The second has no use for single
steps while the same sequences just go on:

    run = core.plan_run(now_s)       steps that only decode, and when each ends; None if the next is not like that
    core.end_run(run, num_steps)     so many of them were run, less than all when something came between
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mock_engine.request import Request
from mock_engine.scheduler import Progress, Schedule, Scheduler
from mock_engine.sequence import SequenceState, Status
from mock_engine.step_times import StepTimes

MAX_RUN_STEPS = 1024


@dataclass(frozen=True, slots=True)
class Step:
    """A pass that is under way: how long it takes, and who is in it."""

    seconds: float
    schedule: Schedule


@dataclass(frozen=True, slots=True)
class Run:
    """
    Passes in a row that only decode, by the same sequences.

    `edges_s` has shape (passes + 1,): the begin of the first, then the end of each, which is the begin of the next.
    """

    edges_s: NDArray[np.float64]

    @property
    def num_steps(self) -> int:
        return len(self.edges_s) - 1


class Token(NamedTuple):
    """One output token, due at `due_s`; `output_index` counts from 0 within its sequence."""

    sequence: SequenceState
    output_index: int
    due_s: float
    is_last: bool


class Core:
    """Scheduler and timing in one: the whole engine, driven from outside."""

    def __init__(self, scheduler: Scheduler, times: StepTimes, is_async: bool = False) -> None:
        self.scheduler = scheduler
        self._times = times
        self._is_async = is_async
        self._now_s = self._decided_s = float("-inf")  # the last step ended, and began
        self._is_idle = True  # at the last look there was no step to begin
        self._current: Step | None = None

    @property
    def has_work(self) -> bool:
        """Whether `begin_step` would find something to run."""
        return bool(self.scheduler.num_running or self.scheduler.waiting)

    @property
    def is_busy(self) -> bool:
        """Whether there is work, and not only such as waits for blocks that others keep."""
        return self.has_work and not self._is_idle

    @property
    def admission_limit_s(self) -> float:
        """Whoever arrived later than that is not in the next step, however much room there is."""
        return self._decided_s if self._is_async and self.is_busy else float("inf")

    @property
    def times(self) -> StepTimes:
        return self._times

    def interrupt(self) -> None:
        """The next step does not follow the last one at once: whoever arrives before it is in it."""
        self._is_idle = True

    def prepare(self, request: Request) -> SequenceState:
        """A sequence for `request`, not queued yet. Raises `RequestError` if it can never be served."""
        self.scheduler.check(request)
        return SequenceState(request)

    def enqueue(self, sequence: SequenceState) -> None:
        """Queue a new sequence; it is looked at in the next `begin_step`."""
        self.scheduler.add(sequence)

    def reserve(self, sequence: SequenceState) -> bool:
        """Take the KV blocks of its prompt before it is queued; False if there are too few now."""
        return self.scheduler.reserve(sequence)

    def cancel(self, sequence: SequenceState) -> None:
        """Forget a sequence; its KV blocks are back when this returns. Safe at any time, and twice."""
        self.scheduler.cancel(sequence)

    def begin_step(self) -> Step | None:
        """Start the next pass. None when there is nothing to run, or when all wait for blocks that others keep."""
        assert self._current is None, "the last step has not ended"
        if not self.has_work:
            return None
        schedule = self.scheduler.schedule()
        if not schedule.load.num_tokens:
            assert self.scheduler.num_kept_blocks or self.scheduler.reserved, "there is work, so something must run"
            self.scheduler.complete(schedule)
            self._is_idle = True
            return None
        self._is_idle = False
        self._current = Step(self._times.step_s(schedule.load), schedule)
        return self._current

    def end_step(self, step: Step, now_s: float) -> Progress:
        """Count what `step` has computed by `now_s`. Time must not run backwards."""
        assert step is self._current, "only the step under way can end"
        assert now_s >= self._now_s, "time never runs back"
        self._current = None
        self._decided_s, self._now_s = self._now_s, now_s
        return self.scheduler.complete(step.schedule)

    def end_step_with_tokens(self, step: Step, now_s: float) -> list[Token]:
        """`end_step`, and every output token of the step, due at `now_s`, in batch order."""
        decoding = self.scheduler.decoding if step.schedule.has_decodes else ()
        made_before = [(sequence, sequence.num_output_tokens) for sequence in decoding]
        progress = self.end_step(step, now_s)
        made_before += [(sequence, sequence.num_output_tokens - 1) for sequence in progress.prefilled]
        return [
            Token(sequence, index, now_s, sequence.status is Status.FINISHED and index == last)
            for sequence, first in made_before
            for last in (sequence.num_output_tokens - 1,)
            for index in range(first, last + 1)
        ]

    def plan_run(self, now_s: float) -> Run | None:
        """
        The passes from `now_s` on in which nothing can change, the last of which may end sequences.

        Nothing happens yet. None when the next pass is not like that; `begin_step` then.
        """
        assert self._current is None, "the last step has not ended"
        num_steps = min(self.scheduler.num_steady_steps(), MAX_RUN_STEPS)
        if not num_steps:
            return None
        self._is_idle = False
        edges_s = np.empty(num_steps + 1)
        edges_s[0] = now_s
        edges_s[1:] = self._times.peek_decode_s(self.scheduler.decode_load, num_steps)
        np.add.accumulate(edges_s, out=edges_s)  # one after the other, as a clock adds them
        return Run(edges_s)

    def end_run(self, run: Run, num_steps: int) -> Progress:
        """The first `num_steps` of `run` are over."""
        self._times.skip(num_steps)
        self._decided_s, self._now_s = run.edges_s[num_steps - 1 : num_steps + 1].tolist()
        return self.scheduler.advance(num_steps)
