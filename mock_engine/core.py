"""
The engine without a clock.

    sequence = core.prepare(request)
    core.enqueue(sequence)
    step = core.begin_step()         what runs now, and for how many seconds; None when idle
    ...a drive lets that much time pass...
    tokens = core.end_step(step, now_s)
    core.cancel(sequence)            at any moment, also between the two

A drive owns time and waiting; the core owns everything else. There are two:
`drive_realtime` (asyncio) and, from the next release on, one in virtual time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from mock_engine.request import Request
from mock_engine.scheduler import Schedule, Scheduler, SequenceState, Status
from mock_engine.step import StepLoad


@dataclass(frozen=True, slots=True)
class Step:
    """A pass that is under way: how long it takes, and who is in it."""

    seconds: float
    schedule: Schedule


class Token(NamedTuple):
    """One output token, due at `due_s`; `output_index` counts from 0 within its sequence."""

    sequence: SequenceState
    output_index: int
    due_s: float
    is_last: bool


class Core:
    """
    Scheduler and timing in one: the whole engine, driven from outside.

    `step_s` gives the seconds a load takes (`timing.TimingModel.step_s`, with or
    without jitter).
    """

    def __init__(self, scheduler: Scheduler, step_s: Callable[[StepLoad], float]) -> None:
        self.scheduler = scheduler
        self._step_s = step_s
        self._now_s = float("-inf")
        self._current: Step | None = None

    @property
    def has_work(self) -> bool:
        """Whether `begin_step` would find something to run."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def prepare(self, request: Request) -> SequenceState:
        """A sequence for `request`, not queued yet. Raises `RequestError` if it can never be served."""
        self.scheduler.check(request)
        return SequenceState(request)

    def enqueue(self, sequence: SequenceState) -> None:
        """Queue a new sequence; it is looked at in the next `begin_step`."""
        self.scheduler.add(sequence)

    def cancel(self, sequence: SequenceState) -> None:
        """Forget a sequence; its KV blocks are back when this returns. Safe at any time, and twice."""
        self.scheduler.cancel(sequence)

    def begin_step(self) -> Step | None:
        """Start the next pass. None when there is nothing to run."""
        assert self._current is None, "the last step has not ended"
        if not self.has_work:
            return None
        schedule = self.scheduler.schedule()
        assert schedule.sequences, "there is work, so something must run"
        self._current = Step(self._step_s(schedule.load), schedule)
        return self._current

    def end_step(self, step: Step, now_s: float) -> list[Token]:
        """The output tokens of `step`, due at `now_s`, in batch order. Time must not run backwards."""
        assert step is self._current, "only the step under way can end"
        assert now_s >= self._now_s, "time never runs back"
        self._current = None
        self._now_s = now_s
        return [
            Token(sequence, sequence.num_output_tokens - 1, now_s, sequence.status is Status.FINISHED)
            for sequence in self.scheduler.complete(step.schedule)
        ]
