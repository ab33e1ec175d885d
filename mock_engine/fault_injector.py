"""
Faults at work in one engine: what asks it at which moment, and what it is told.

    injector = FaultInjector(faults, seed, die)
    injector.start_delay_s, injector.start_failure, injector.cleanup_delay_s
    injector.step_s(seconds, now_s, rank)          how long a step takes that would take `seconds`
    injector.num_held_blocks(total, now_s, rank)   KV blocks that are taken away now
    injector.admit(now_s, rank)                    a request arrives: what happens to it; None: nothing
    injector.count_tokens(number, now_s)           so many output tokens have come out
    injector.keeps_kv_event("stored", now_s, rank) whether a KV event is to be published
    injector.tick(now_s)                           time has passed
    injector.set(faults, now_s)                    others from now on

It neither waits nor looks at a clock: `now_s` is the model's time, never less than before. Chance is drawn from the
seed, the fault, and the number of the request (or step, or event) since the fault was set, so that a run with the same
requests in the same order has the same faults, whatever the time of day. Counting is the worker's: all ranks together.

Who asks keeps an injector only where there are faults, or looks at `is_empty` first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar

from mock_engine.faults import (
    Death,
    FailedRequest,
    FailedStart,
    Fault,
    Hang,
    KvExhaustion,
    LostKvEvents,
    Slow,
    SlowCleanup,
    SlowFirstToken,
    SlowStart,
    Stall,
)

F = TypeVar("F", bound=Fault)


class RequestFault(NamedTuple):
    """What happens to one request."""

    delay_s: float  # before it is queued
    error: FailedRequest | None
    hang: Hang | None

    @property
    def num_whole_tokens(self) -> int:
        """Output tokens that come out as they should."""
        return min(each.tokens for each in (self.error, self.hang) if each is not None)

    @property
    def breaks(self) -> bool:
        """Whether its answer does not come to its end."""
        return self.error is not None or self.hang is not None


@dataclass(slots=True, eq=False)
class _Set:
    """A fault that has been set, and what it has done since."""

    fault: Fault
    number: int  # in order of setting; part of the seed
    since_s: float | None  # seconds count from here; None as long as `after_...` is not reached
    requests_before: int
    tokens_before: int
    num_hits: int = 0
    last_window: int = -1
    num_drawn: dict[int, int] = field(default_factory=dict)  # steps or KV events that it could have hit, by rank

    @property
    def is_used_up(self) -> bool:
        return self.fault.times is not None and self.num_hits >= self.fault.times


class FaultInjector:
    """See the module. `die` ends the process, and may return in tests; it gets the fault's text."""

    def __init__(
        self, faults: Iterable[Fault] = (), seed: int = 0, die: Callable[[str], None] = lambda _: None
    ) -> None:
        self._seed = seed
        self._die = die
        self._num_requests = 0
        self._num_tokens = 0
        self._num_set = 0
        self._sets: list[_Set] = []
        self.add(faults, 0.0)

    @property
    def is_empty(self) -> bool:
        return not self._sets

    @property
    def faults(self) -> list[Fault]:
        return [each.fault for each in self._sets]

    def set(self, faults: Iterable[Fault], now_s: float) -> None:
        """These and no others, from now on; the same ones begin anew."""
        self._sets = []
        self.add(faults, now_s)

    def add(self, faults: Iterable[Fault], now_s: float) -> None:
        """These too."""
        for fault in faults:
            is_waiting = fault.after_requests or fault.after_tokens
            since_s = None if is_waiting else now_s
            self._sets.append(_Set(fault, self._num_set, since_s, self._num_requests, self._num_tokens))
            self._num_set += 1

    def clear(self, kind: str) -> None:
        """None of that kind any more."""
        self._sets = [each for each in self._sets if each.fault.kind != kind]

    def describe(self, now_s: float) -> list[dict[str, Any]]:
        """Each fault as it was given, whether it is there now, and how often it has hit."""
        return [
            {
                **each.fault.to_mapping(),
                "is_on": self._window(each, now_s) is not None and not each.is_used_up,
                "num_hits": each.num_hits,
            }
            for each in self._sets
        ]

    @property
    def start_failure(self) -> str | None:
        """Why starting fails, if it does."""
        return next((each.fault.message for each in self._sets if isinstance(each.fault, FailedStart)), None)

    @property
    def start_delay_s(self) -> float:
        """Seconds that starting takes more."""
        return sum(each.fault.seconds for each in self._sets if isinstance(each.fault, SlowStart))

    @property
    def cleanup_delay_s(self) -> float:
        """Seconds that cleaning up takes more."""
        return sum(each.fault.seconds for each in self._sets if isinstance(each.fault, SlowCleanup))

    def step_s(self, seconds: float, now_s: float, rank: int = 0) -> float:
        """Seconds of a step that begins now and would take `seconds`."""
        extra_s = 0.0
        for slow, _, _ in self._on(Slow, now_s, rank):
            seconds *= slow.factor
        for stall, each, window in self._on(Stall, now_s, rank):
            if stall.is_once:
                is_hit = window > each.last_window
                each.last_window = window
            else:
                is_hit = self._is_drawn(each, self._next(each, rank), rank)
            if is_hit:
                each.num_hits += 1
                extra_s += stall.seconds
        return seconds + extra_s

    def num_held_blocks(self, total: int, now_s: float, rank: int = 0) -> int:
        """Of `total` KV blocks, how many are taken away."""
        held = 0
        for exhaustion, each, window in self._on(KvExhaustion, now_s, rank):
            if window > each.last_window:
                each.last_window = window
                each.num_hits += 1
            held += exhaustion.num_blocks(total)
        return min(total, held)

    def admit(self, now_s: float, rank: int = 0) -> RequestFault | None:
        """One more request is there. What happens to it: None if nothing does."""
        delay_s, error, hang = 0.0, None, None
        for slow, each, _ in self._on(SlowFirstToken, now_s, rank):
            if self._hits_request(each):
                delay_s += slow.seconds
        for failed, each, _ in self._on(FailedRequest, now_s, rank):
            if error is None and self._hits_request(each):
                error = failed
        for hanging, each, _ in self._on(Hang, now_s, rank):
            if hang is None and self._hits_request(each):
                hang = hanging
        self._look_for_death(now_s, is_request=True)
        self._num_requests += 1
        self._arm(now_s)
        return RequestFault(delay_s, error, hang) if delay_s or error or hang else None

    def count_tokens(self, number: int, now_s: float) -> None:
        """So many output tokens have come out."""
        self._num_tokens += number
        self.tick(now_s)

    def tick(self, now_s: float) -> None:
        """Time has passed: does the process die?"""
        self._arm(now_s)
        self._look_for_death(now_s, is_request=False)

    def keeps_kv_event(self, event: str, now_s: float, rank: int = 0) -> bool:
        """Whether a KV event, "stored" or "removed", is to be published."""
        is_kept = True
        for lost, each, _ in self._on(LostKvEvents, now_s, rank):
            if lost.event in ("all", event) and self._is_drawn(each, self._next(each, rank), rank):
                each.num_hits += 1
                is_kept = False
        return is_kept

    def _on(self, kind: type[F], now_s: float, rank: int) -> Iterator[tuple[F, _Set, int]]:
        """The faults of a kind that are there now, and in which of their windows."""
        for each in self._sets:
            fault = each.fault
            if isinstance(fault, kind) and fault.rank in (None, rank) and not each.is_used_up:
                window = self._window(each, now_s)
                if window is not None:
                    yield fault, each, window

    def _window(self, each: _Set, now_s: float) -> int | None:
        return None if each.since_s is None else each.fault.window(now_s - each.since_s)

    def _arm(self, now_s: float) -> None:
        for each in self._sets:
            if (
                each.since_s is None
                and self._num_requests - each.requests_before >= each.fault.after_requests
                and self._num_tokens - each.tokens_before >= each.fault.after_tokens
            ):
                each.since_s = now_s

    def _hits_request(self, each: _Set) -> bool:
        is_hit = self._is_drawn(each, self._num_requests - each.requests_before)
        each.num_hits += is_hit
        return is_hit

    def _look_for_death(self, now_s: float, is_request: bool) -> None:
        for each in list(self._sets):
            if not isinstance(each.fault, Death) or each.num_hits or self._window(each, now_s) is None:
                continue
            if each.fault.rate is None or (is_request and self._hits_request(each)):
                each.num_hits = 1
                self._die(each.fault.to_text())

    def _next(self, each: _Set, rank: int) -> int:
        number = each.num_drawn.get(rank, 0)
        each.num_drawn[rank] = number + 1
        return number

    def _is_drawn(self, each: _Set, number: int, rank: int = 0) -> bool:
        """Whether a fault's rate hits the `number`th of what it can hit."""
        rate = each.fault.rate
        if rate is None:
            return True
        digest = blake2b(f"{self._seed}/{each.number}/{rank}/{number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < rate * 2.0**64
