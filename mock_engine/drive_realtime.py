"""
The engine in real time, on asyncio.

    drive = RealTimeDrive(core)
    drive.start()
    stream = drive.submit([request])
    while tokens := await stream.next_tokens():
        drive.note_sent(stream, tokens)
    drive.cancel(stream)             at any moment, from any thread
    await drive.stop()

Every step has an absolute deadline: the end of the step before it plus its
own seconds. The drive never sleeps "for a step", so neither a slow consumer
nor a late wake-up pushes later tokens back, and there is no drift. A consumer
that falls behind finds several tokens waiting, as with vLLM.

Cancelling must work where an event loop is not at hand (a dropped generator
is finalized on whatever thread drops it), so it takes a lock that is never
waited for: a cancel that finds it taken leaves a note, and whoever holds the
lock acts on it before going on.

For a prompt that another worker has computed, `submit` comes in three parts: `prepare`, `want` the KV blocks for it,
and `enqueue` once the KV cache is there. And where a request keeps its blocks, `on_kept` is told when it has ended;
they come back with `give_back`, or at `stop`.

What changes the engine from outside (`controls`) happens between two steps, as in a real one, whose GPU cannot
be interrupted either:

    await drive.between_steps(call)
    await drive.set_paused(True)     no step begins until False; model time goes on, and no token is late by that
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from mock_engine.core import Core, Step, Token
from mock_engine.fault_injector import FaultInjector
from mock_engine.lateness import LatenessHistogram
from mock_engine.request import Request
from mock_engine.sequence import SequenceState

logger = logging.getLogger(__name__)

_POLL_S = 0.02  # how often streams are asked whether their client has gone, and idle engines look for faults

T = TypeVar("T")


class Clock(Protocol):
    """Monotonic seconds, and a wait."""

    def now_s(self) -> float: ...

    async def wait_until(self, due_s: float) -> None: ...

    def close(self) -> None: ...


class Stream:
    """
    The output of one or more requests that live and die together (the choices of one prompt).

    One consumer. `due_s` and `sent_s` hold, for each choice, one entry a token, in model seconds.
    """

    def __init__(
        self, drive: RealTimeDrive, sequences: Sequence[SequenceState], arrival_s: float, is_stopped: Callable[[], bool]
    ) -> None:
        self.drive = drive
        self._ready: list[Token] = []
        self._waiter: asyncio.Future[None] | None = None
        self.sequences = sequences
        self.arrival_s = arrival_s
        self.queued_s = arrival_s
        self.timer: asyncio.TimerHandle | None = None  # runs where a fault delays it
        self.is_stopped = is_stopped
        self.is_cancelled = False
        self.is_let_go = False  # its consumer has gone
        self.on_cancelled: Callable[[], object] | None = None  # called on the drive's loop
        self.started_s: list[float | None] = [None] * len(sequences)  # when each was first taken into a step
        self.on_started: Callable[[], None] = lambda: None  # called at the first of them
        self.due_s: list[list[float]] = [[] for _ in sequences]
        self.sent_s: list[list[float]] = [[] for _ in sequences]

    async def next_tokens(self) -> list[Token]:
        """
        The tokens that became due since the last call; waits for at least one.

        Empty once the stream is cancelled. Raises RuntimeError if the drive has failed.
        """
        while not self._ready and not self.is_cancelled:
            self.drive.raise_failure()
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self.is_cancelled:
            return []
        tokens, self._ready = self._ready, []
        return tokens

    def push(self, token: Token) -> None:
        """Called by the drive, on its loop."""
        self._ready.append(token)
        self.wake()

    def wake(self) -> None:
        """Let `next_tokens` look again. On the drive's loop only."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if self.is_cancelled and self.on_cancelled is not None:
            on_cancelled, self.on_cancelled = self.on_cancelled, None
            on_cancelled()


class RealTimeDrive:
    """
    Paces a core by a clock. `speedup_ratio` is model seconds per real second; 0 runs as fast as it can.

    All public times are model seconds. `start`, `submit` and `stop` belong on the event loop;
    `cancel` can be called from anywhere.
    """

    def __init__(
        self,
        core: Core,
        clock: Clock,
        speedup_ratio: float = 1.0,
        dp_rank: int = 0,
        faults: FaultInjector | None = None,
    ) -> None:
        self.core = core
        self.dp_rank = dp_rank  # which of a worker's engines this is
        self.profiler: Callable[[Step, float, float], None] | None = None  # told begin and end of each step
        self.lateness = LatenessHistogram()
        self.num_output_tokens = 0
        self.streams: dict[SequenceState, Stream] = {}
        # Called when the core has changed and nobody else can change it: after each half of a step, and after a cancel.
        self.on_change: Callable[[], None] = lambda: None
        # Called when a step is over, with it and the model's time.
        self.on_step: Callable[[Step, float], None] = lambda _step, _end_s: None
        self._clock = clock
        self._faults = faults if faults is not None else FaultInjector()
        self._speedup_ratio = speedup_ratio
        self._model_now_s = 0.0  # end of the last step; the only clock there is when speedup_ratio is 0
        self._model_epoch_s = self._clock_epoch_s = 0.0  # the same moment: since then there is this speedup_ratio
        self._calls: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._is_paused = False
        self._arrivals: deque[Stream] = deque()
        self._wanting: dict[Stream, Callable[[], None]] = {}  # who waits for blocks before it is queued
        self._kept: set[SequenceState] = set()  # ended, and their blocks are still taken
        self.on_kept: Callable[[Stream, SequenceState], None] = lambda _stream, _sequence: None
        self._idle: asyncio.Future[None] | None = None
        self._lock = threading.Lock()
        self._doomed: deque[Stream | SequenceState] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Begin to run steps on the current event loop."""
        self._loop = asyncio.get_running_loop()
        for work, name in ((self._run_guarded, "mock-engine-steps"), (self._watch_clients, "mock-engine-watch")):
            self._tasks.append(self._loop.create_task(work(), name=name))  # one by one: `stop` ends those there are

    async def stop(self) -> None:
        """End every task and stream. Streams that were still open see themselves cancelled. Safe twice."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._refuse_calls("the engine has been stopped")
        for stream in set(self.streams.values()):
            self.cancel(stream)
        for sequence in tuple(self._kept):
            self.give_back(sequence)
        self._clock.close()

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return self.core.scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that are not in the batch. (Read without the lock: near enough.)"""
        return max(0, len(self.streams) - self.core.scheduler.num_running)

    @property
    def speedup_ratio(self) -> float:
        """Model seconds per real second; 0 if nothing is paced."""
        return self._speedup_ratio

    def now_s(self) -> float:
        """The model's time."""
        if self._speedup_ratio == 0:
            return self._model_now_s
        return self._model_epoch_s + (self._clock.now_s() - self._clock_epoch_s) * self._speedup_ratio

    def real_s(self, model_s: float) -> float:
        """The real seconds in which `model_s` of the model's pass."""
        return model_s / self._speedup_ratio if self._speedup_ratio else 0.0

    @property
    def num_kept_blocks(self) -> int:
        """KV blocks that are taken for requests that have ended, and for them alone."""
        kept = tuple(self._kept)
        hashes = {block_hash for sequence in kept for block_hash in sequence.table.hashes}
        hashes.difference_update(*(sequence.table.hashes for sequence in tuple(self.streams)))
        return len(hashes) + sum(sequence.table.num_private for sequence in kept)

    @property
    def last_step_s(self) -> float:
        """The end of the last step: the model's time as any thread can know it, without a clock."""
        return self._model_now_s

    @property
    def is_paused(self) -> bool:
        return self._is_paused

    async def between_steps(self, call: Callable[[], T]) -> T:
        """What `call` returns, once no step is under way. Raises what it raises; RuntimeError if no step ever ends."""
        self.raise_failure()
        if not self._tasks:
            raise RuntimeError("the engine is not running")
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._calls.append((call, done))
        self._wake()
        return await done

    async def set_paused(self, is_paused: bool) -> None:
        """Whether steps stop. Returns when the one under way has ended."""

        def set_it() -> None:
            self._is_paused = is_paused

        await self.between_steps(set_it)

    async def set_speedup_ratio(self, speedup_ratio: float) -> None:
        """From the end of the step under way on, time passes at another pace. The model's time does not jump."""

        def set_it() -> None:
            now_s = self.now_s()
            self._model_epoch_s, self._clock_epoch_s = now_s, self._clock.now_s()
            self._speedup_ratio = speedup_ratio
            if not speedup_ratio:
                self._model_now_s = max(self._model_now_s, now_s)

        await self.between_steps(set_it)

    def submit(
        self, requests: Sequence[Request], is_stopped: Callable[[], bool] = lambda: False, delay_s: float = 0.0
    ) -> Stream:
        """
        Queue requests that arrive now, as one stream. Raises `RequestError` if one can never be served.

        `is_stopped` is asked every 20 ms whether the client has gone. With a delay they are queued that much later.
        """
        stream = self.prepare(requests, is_stopped)
        self.after_delay(stream, delay_s, self.enqueue)
        return stream

    def after_delay(self, stream: Stream, delay_s: float, go_on: Callable[[Stream], None]) -> None:
        """Go on with a prepared stream in so many model seconds, unless it is cancelled before. At once for 0."""
        if not delay_s:
            go_on(stream)
            return

        def at_last() -> None:
            if not stream.is_cancelled:
                go_on(stream)

        stream.timer = asyncio.get_running_loop().call_later(self.real_s(delay_s), at_last)

    def prepare(self, requests: Sequence[Request], is_stopped: Callable[[], bool] = lambda: False) -> Stream:
        """A stream that is not queued yet. Raises `RequestError` if one of its requests can never be served."""
        self.raise_failure()
        sequences = [self.core.prepare(request) for request in requests]
        stream = Stream(self, sequences, self.now_s(), is_stopped)
        with self._lock:
            for sequence in sequences:
                self.streams[sequence] = stream
        self._reap()
        return stream

    def want(self, stream: Stream, on_reserved: Callable[[], None]) -> None:
        """
        Let the first sequence of a prepared stream have the KV blocks of its prompt, first come, first served.

        `on_reserved` is called on the loop, at once if it can have them now; never after the stream is cancelled.
        """
        with self._lock:
            if not stream.is_cancelled:
                self._wanting[stream] = on_reserved
            self._reserve()
        self._reap()

    def enqueue(self, stream: Stream) -> None:
        """Queue a prepared stream, now. A no-op if it has been cancelled meanwhile."""
        with self._lock:
            self._wanting.pop(stream, None)
            if not stream.is_cancelled:
                stream.queued_s = self.now_s()
                self._arrivals.append(stream)
        self._reap()
        self._wake()

    def forget_remote(self, stream: Stream) -> None:
        """The KV cache of a prepared stream does not come: its prompt is computed here."""
        for sequence in stream.sequences:
            sequence.num_remote_tokens = 0

    def give_back(self, sequence: SequenceState) -> None:
        """Take the blocks back of an ended request that keeps them. Safe twice, and from any thread."""
        self._doomed.append(sequence)
        self._reap()

    def cancel(self, stream: Stream) -> None:
        """Forget a stream and give its KV blocks back. Safe at any time, twice, and from any thread."""
        self._doomed.append(stream)
        self._reap()

    def note_sent(self, stream: Stream, tokens: Sequence[Token]) -> None:
        """The consumer sends these tokens now: record when they were due and when they went out."""
        now_s = self.now_s()
        for token in tokens:
            choice = token.sequence.request.choice
            stream.due_s[choice].append(token.due_s)
            stream.sent_s[choice].append(now_s)
            if self._speedup_ratio:
                self.lateness.add((now_s - token.due_s) / self._speedup_ratio)
        self.num_output_tokens += len(tokens)

    def raise_failure(self) -> None:
        """Raise what stopped the drive, if something did."""
        if self._failure is not None:
            raise RuntimeError("the engine has stopped because of an internal error") from self._failure

    def _reap(self) -> None:
        """Carry out the cancels that are noted, unless another thread (or this one, further up) holds the lock."""
        while self._doomed and self._lock.acquire(blocking=False):
            try:
                while self._doomed:
                    doomed = self._doomed.popleft()
                    if isinstance(doomed, Stream):
                        self._release(doomed)
                    elif doomed in self._kept:
                        self._kept.remove(doomed)
                        self.core.scheduler.give_back(doomed)
                        self._call_on_loop(self._wake)
            finally:
                self._lock.release()

    def _release(self, stream: Stream) -> None:
        open_sequences = [sequence for sequence in stream.sequences if self.streams.pop(sequence, None) is not None]
        if not open_sequences:
            return
        if stream in self._arrivals:
            self._arrivals.remove(stream)
        self._wanting.pop(stream, None)
        for sequence in open_sequences:
            self.core.cancel(sequence)
        self.on_change()
        stream.is_cancelled = True
        if stream.timer is not None:
            self._call_on_loop(stream.timer.cancel)
        self._call_on_loop(stream.wake)
        if self._wanting or self.core.scheduler.waiting:
            self._call_on_loop(self._wake)

    def _call_on_loop(self, function: Callable[[], None]) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is waiting
                self._loop.call_soon_threadsafe(function)

    def _wake(self) -> None:
        """Let an idle drive look again. On its loop only."""
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _reserve(self) -> None:
        """Give blocks to those who want them, as far as they go."""
        while self._wanting:
            stream = next(iter(self._wanting))
            if not self.core.reserve(stream.sequences[0]):
                return
            self._wanting.pop(stream)()

    async def _run_guarded(self) -> None:
        try:
            await self._run()
        except Exception as failure:
            logger.exception("the engine stopped")
            self._failure = failure
            self._refuse_calls("the engine has stopped because of an internal error")
            for stream in set(self.streams.values()):  # a copy: other threads may be cancelling
                stream.wake()

    async def _run(self) -> None:
        while True:
            if self._calls or self._is_paused:
                await self._carry_out_calls()
            with self._lock:
                self._admit_arrivals()
                self._reserve()
                if self._has_faults:
                    self._hold_blocks(self._model_now_s)
                step = self.core.begin_step()
                self.on_change()
            self._reap()
            if step is None:
                await self._wait_for_work()
                continue
            self._note_started(step)
            seconds = step.seconds
            if self._has_faults:
                seconds = self._faults.step_s(seconds, self._model_now_s, self.dp_rank)
            end_s = self._model_now_s + seconds
            if self._speedup_ratio == 0:
                await asyncio.sleep(0)
            else:
                await self._clock.wait_until(self._clock_epoch_s + self.real_s(end_s - self._model_epoch_s))
            if self.profiler is not None:
                self.profiler(step, self._model_now_s, end_s)
            with self._lock:
                self._model_now_s = end_s
                tokens = self.core.end_step_with_tokens(step, end_s)
                self.on_change()
                # All are due now, and a host takes a while to send them: a delay shows in TTFT as it is, in ITL hardly.
                for token in sorted(tokens, key=_is_later_token):
                    self._deliver(token)
            self.on_step(step if seconds == step.seconds else replace(step, seconds=seconds), end_s)
            self._reap()
            if self._has_faults:
                self._faults.count_tokens(len(tokens), end_s)

    async def _carry_out_calls(self) -> None:
        """Do what was asked for. Returns when the next step may begin."""
        was_paused = self._is_paused
        while self._calls or self._is_paused:
            while self._calls:
                call, done = self._calls.popleft()
                if done.done():  # nobody waits for it any more
                    continue
                try:
                    with self._lock:
                        result = call()
                        self.on_change()
                except Exception as error:
                    done.set_exception(error)
                else:
                    done.set_result(result)
                self._reap()
            if self._is_paused:
                was_paused = True
                await self._wait()
        if was_paused:
            self._model_now_s = max(self._model_now_s, self.now_s())
            self.core.interrupt()

    def _refuse_calls(self, reason: str) -> None:
        while self._calls:
            _, done = self._calls.popleft()
            if not done.done():
                done.set_exception(RuntimeError(reason))

    @property
    def _has_faults(self) -> bool:
        return not self._faults.is_empty or self.core.scheduler.num_held_blocks > 0

    def _hold_blocks(self, now_s: float) -> bool:
        """Take away as many KV blocks as faults say; whether that is another number than before."""
        scheduler = self.core.scheduler
        before = scheduler.num_held_blocks
        scheduler.hold(self._faults.num_held_blocks(scheduler.blocks.num_blocks, now_s, self.dp_rank))
        return scheduler.num_held_blocks != before

    def _note_started(self, step: Step) -> None:
        for sequence, _ in step.schedule.prefills:
            stream = self.streams.get(sequence)  # none if it has been cancelled just now
            if stream is not None and stream.started_s[sequence.request.choice] is None:
                is_first = not any(started_s is not None for started_s in stream.started_s)
                stream.started_s[sequence.request.choice] = self._model_now_s
                if is_first:
                    stream.on_started()

    def _deliver(self, token: Token) -> None:
        stream = self.streams[token.sequence]
        stream.push(token)
        if token.is_last:
            del self.streams[token.sequence]
            if token.sequence.request.keeps_blocks:
                self._kept.add(token.sequence)
                self.on_kept(stream, token.sequence)

    def _admit_arrivals(self) -> None:
        """Hand over what has arrived by the model's time; an idle engine moves on to the next arrival."""
        if self._arrivals and not self.core.has_work:
            self._model_now_s = max(self._model_now_s, self._arrivals[0].queued_s)
        limit_s = min(self._model_now_s, self.core.admission_limit_s)
        while self._arrivals and self._arrivals[0].queued_s <= limit_s:
            for sequence in self._arrivals.popleft().sequences:
                self.core.enqueue(sequence)

    async def _wait_for_work(self) -> None:
        """There is nothing to do, or all wait for KV blocks that others keep."""
        if not self._arrivals and not self._doomed:
            await self._wait()
        if self.core.has_work:  # it waited for blocks, and goes on now
            self._model_now_s = max(self._model_now_s, self.now_s())

    async def _wait(self) -> None:
        """Until `_wake`."""
        self._idle = asyncio.get_running_loop().create_future()
        try:
            await self._idle
        finally:
            self._idle = None

    async def _watch_clients(self) -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            if self._has_faults:
                self._look_for_faults()
            for stream in set(self.streams.values()):
                if stream.is_stopped():
                    self.cancel(stream)

    def _look_for_faults(self) -> None:
        """An engine that does nothing may have its blocks taken or given back, or die."""
        self._faults.tick(self.now_s())
        if self._idle is None or self._is_paused:
            return
        if self.core.has_work and not self._speedup_ratio:
            self._model_now_s += _POLL_S  # nothing else moves it on
        with self._lock:
            is_changed = self._hold_blocks(self.now_s())
            self.on_change()
        self._reap()
        if is_changed:
            self._wake()


def _is_later_token(token: Token) -> bool:
    return token.output_index > 0
