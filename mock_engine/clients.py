"""
Those who send requests, in virtual time: at given moments, or each when its last one is answered.

    clients = Clients(clock, sessions, deployment.submit, deployment.cancel, settings, rng)
    clients.start()
    clients.job_ended(job)         the deployment says so

Sessions are taken from an iterator as they are needed: a trace of any length passes through.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import simpy

from mock_engine.deployment import Job
from mock_engine.drive_virtual import VirtualClock
from mock_engine.session import Session


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """How they behave, whatever they send."""

    max_concurrency: int | None = None  # sessions under way at once, as AIPerf counts; None: any number
    ramp_s: float = 0.0  # over which that limit grows, from 1
    end_s: float = math.inf  # nothing is sent then or later
    turnaround_s: float = 0.0  # mean time from the end of an answer until its client sends again
    cancelled_share: float = 0.0  # of requests whose client goes away ...
    cancel_after_s: float = 0.0  # ... so long after it has sent


class Conversation:
    """A session that is under way, and how far."""

    __slots__ = ("number", "session", "turn_index")

    def __init__(self, number: int, session: Session) -> None:
        self.number = number
        self.session = session
        self.turn_index = 0


class Clients:
    """See the module. All sessions have an arrival time, or none has."""

    def __init__(
        self,
        clock: VirtualClock,
        sessions: Iterator[Session],
        submit: Callable[[Job], None],
        cancel: Callable[[Job], None],
        settings: ClientSettings,
        rng: np.random.Generator,
    ) -> None:
        self.num_sent = 0
        self.last_sent_s = 0.0
        self.num_under_way = 0  # requests
        self._request_seconds = 0.0  # integral of `num_under_way` over time...
        self._counted_s = 0.0  # ...up to here
        self._clock = clock
        self._sessions = sessions
        self._submit = submit
        self._cancel = cancel
        self._settings = settings
        self._rng = rng
        self._limit = settings.max_concurrency or math.inf
        self._num_open = 0  # sessions under way
        self._ready: deque[Session] = deque()  # have arrived, and wait for others to end
        self.is_closed_loop = False  # each is sent when another has ended, not at a moment of its own
        self._is_opening = False
        self._is_stopped = False

    @property
    def request_seconds(self) -> float:
        """Requests under way, integrated over time until now."""
        return self._request_seconds + self.num_under_way * (self._clock.now - self._counted_s)

    def start(self) -> None:
        """Begin to send at time 0, or when the first one arrives."""
        first = next(self._sessions, None)
        if first is None:
            return
        self.is_closed_loop = first.arrival_s is None
        if self._settings.ramp_s and self._settings.max_concurrency is not None:
            self._limit = 1
            for number in range(1, self._settings.max_concurrency):
                at_s = self._settings.ramp_s * number / self._settings.max_concurrency
                self._clock.call_at(at_s, self._raise_limit)
        elif self._settings.turnaround_s and self.is_closed_loop and self._settings.max_concurrency is not None:
            # Those who do not come back at one moment do not come at one in the first place.
            self._limit = 0
            for at_s in self._rng.exponential(self._settings.turnaround_s, self._settings.max_concurrency):
                self._clock.call_at(float(at_s), self._raise_limit)
        if first.arrival_s is None:
            self._ready.append(first)
            self._clock.call_at(0.0, lambda _: self._open_sessions())
        else:
            self._expect(first, first.arrival_s)

    def stop(self) -> None:
        """Send nothing more."""
        self._is_stopped = True

    def job_ended(self, job: Job) -> None:
        """Its client can go on."""
        self._count(-1)
        if self._settings.turnaround_s:
            # Exponential: clients that are answered at the same moment do not all come back at the same moment.
            turnaround_s = self._rng.exponential(self._settings.turnaround_s)
            self._clock.call_at(self._clock.now + turnaround_s, lambda _: self._go_on(job))
        else:
            self._go_on(job)

    def _go_on(self, job: Job) -> None:
        conversation: Conversation = job.client  # type: ignore[assignment]
        conversation.turn_index += 1
        turns = conversation.session.turns
        if conversation.turn_index == len(turns) or job.failure is not None or job.is_cancelled:
            self._num_open -= 1
            self._open_sessions()
        elif think_s := turns[conversation.turn_index].think_s:
            self._clock.call_at(self._clock.now + think_s, lambda _: self._send(conversation))
        else:
            self._send(conversation)

    def _raise_limit(self, _: simpy.Event) -> None:
        self._limit += 1
        self._open_sessions()

    def _expect(self, session: Session, arrival_s: float) -> None:
        self._clock.call_at(arrival_s, lambda _: self._arrive(session))

    def _arrive(self, session: Session) -> None:
        self._ready.append(session)
        self._open_sessions()
        following = next(self._sessions, None)
        if following is not None:
            assert following.arrival_s is not None, "all sessions have a time, or none"
            self._expect(following, following.arrival_s)

    def _open_sessions(self) -> None:
        """Start as many sessions as may be under way."""
        if self._is_opening:  # a request failed at once: the loop below goes on
            return
        self._is_opening = True
        while self._num_open < self._limit:
            if self._ready:
                session = self._ready.popleft()
            elif not self.is_closed_loop or (session := next(self._sessions, None)) is None:  # type: ignore[assignment]
                break
            self._num_open += 1
            self._send(Conversation(self.num_sent, session))
        self._is_opening = False

    def _send(self, conversation: Conversation) -> None:
        now_s = self._clock.now
        if self._is_stopped or now_s >= self._settings.end_s:
            return
        turn = conversation.session.turns[conversation.turn_index]
        job = Job(self.num_sent, turn.isl_tokens, turn.osl_tokens, turn.block_hashes, now_s, conversation)
        self.num_sent += 1
        self.last_sent_s = now_s
        self._count(+1)
        if self._settings.cancelled_share and self._rng.random() < self._settings.cancelled_share:
            self._clock.call_at(now_s + self._settings.cancel_after_s, lambda _: self._cancel(job))
        self._submit(job)

    def _count(self, change: int) -> None:
        now_s = self._clock.now
        self._request_seconds += self.num_under_way * (now_s - self._counted_s)
        self._counted_s = now_s
        self.num_under_way += change
