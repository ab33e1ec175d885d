"""
Several engines as one service, in virtual time: workers, routers, hand-over from prefill to decode.

    deployment = Deployment(settings, clock, log, states, on_end)
    deployment.submit(job)         when its client sends it; `on_end(job)` is called once, when it has ended
    deployment.cancel(job)

Aggregated, a worker does all of a request. Disaggregated, a prefill worker computes the
prompt, keeps its KV blocks until they are with a decode worker, and that one makes all
output tokens, as vLLM under Dynamo does: the first comes with the last prompt token, which is computed again.
The decode worker takes the blocks for the prompt first; where it has too few, the transfer waits.

Links are simpy resources: a worker sends, and receives, one KV cache at a time, at full bandwidth.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import simpy
from numpy.typing import NDArray

from mock_engine.drive_virtual import Flight, Observer, Stretch, VirtualClock, VirtualDrive
from mock_engine.engine_settings import Engine, EngineSettings, build_engines
from mock_engine.errors import ConfigError, RequestError
from mock_engine.kv_transfer import DEFAULT_BANDWIDTH, TRANSFER_MODES, check_bandwidth, transfer_s
from mock_engine.request import Request
from mock_engine.roles import ROLES, check_migration_limit, check_num_workers
from mock_engine.router_settings import RouterSettings
from mock_engine.routing import RoutedLoad, Router, make_router
from mock_engine.step import StepLoad
from mock_engine.worker_settings import check_data_parallel_size


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """Workers that are alike. `role` is as in Dynamo's `--disaggregation-mode`."""

    engine: EngineSettings
    num_workers: int = 1
    role: str = "agg"


@dataclass(frozen=True, slots=True)
class DeploymentSettings:
    """What is deployed. Workers count from 0 through all groups. Raises `ConfigError` for what cannot be."""

    groups: tuple[WorkerGroup, ...]
    data_parallel_size: int = 1  # engines in each worker, each with its own KV cache and GPUs
    router: RouterSettings = field(default_factory=RouterSettings)
    kv_transfer_bandwidth: float = DEFAULT_BANDWIDTH  # GB/s of each worker, each way
    kv_transfer_timing_mode: str = "full_prompt"
    startup_time: float = 0.0  # s until a worker serves, for those that `starts_s` does not name
    starts_s: dict[int, float] = field(default_factory=dict)  # worker -> when it serves
    losses_s: dict[int, float] = field(default_factory=dict)  # worker -> when it is lost
    has_ingress: bool = True  # whether requests spend the profile's `overhead_request_s` before they are queued
    migration_limit: int = 0  # how often a request of a lost worker is sent to another

    def __post_init__(self) -> None:
        check_num_workers([(group.role, group.num_workers) for group in self.groups])
        check_data_parallel_size(self.data_parallel_size)
        check_bandwidth(self.kv_transfer_bandwidth)
        if self.kv_transfer_timing_mode not in TRANSFER_MODES:
            raise ConfigError(
                f"--kv-transfer-timing-mode is {self.kv_transfer_timing_mode!r}; allowed is {', '.join(TRANSFER_MODES)}"
            )
        if not 0 <= self.startup_time < math.inf:
            raise ConfigError(f"--startup-time is {self.startup_time:g}; it must be 0 or more, in seconds")
        check_migration_limit(self.migration_limit)
        for name, times_s in (("--start-worker", self.starts_s), ("--lose-worker", self.losses_s)):
            for worker, time_s in times_s.items():
                if not 0 <= worker < self.num_workers:
                    raise ConfigError(f"{name} names worker {worker}; there are 0 to {self.num_workers - 1}")
                if not 0 <= time_s < math.inf:
                    raise ConfigError(f"{name} {worker}:{time_s:g} has no time of 0 s or more")
        for worker, lost_s in self.losses_s.items():
            if lost_s < self.start_s(worker):
                raise ConfigError(
                    f"--lose-worker {worker}:{lost_s:g} is before that worker starts, at {self.start_s(worker):g} s"
                )

    @property
    def num_workers(self) -> int:
        return sum(group.num_workers for group in self.groups)

    def start_s(self, worker: int) -> float:
        """When that worker begins to serve."""
        return self.starts_s.get(worker, self.startup_time)


class Job:
    """One request of a client, wherever in the deployment it is. Times are None until then."""

    __slots__ = (
        "block_hashes",
        "client",
        "failure",
        "first_token_s",
        "flight",
        "handover",
        "is_cancelled",
        "isl_tokens",
        "last_token_s",
        "num_cached_tokens",
        "num_preemptions",
        "num_tokens_before",
        "num_tries",
        "number",
        "osl_tokens",
        "rank",
        "second_token_s",
        "sent_s",
    )

    def __init__(
        self, number: int, isl_tokens: int, osl_tokens: int, block_hashes: Sequence[int], sent_s: float, client: object
    ) -> None:
        self.number = number
        self.isl_tokens = isl_tokens
        self.osl_tokens = osl_tokens
        self.block_hashes = block_hashes
        self.sent_s = sent_s
        self.client = client  # whatever the sender wants to find here again
        self.first_token_s: float | None = None
        self.second_token_s: float | None = None
        self.last_token_s: float | None = None
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.num_tokens_before = 0  # made by workers that were lost
        self.num_tries = 0
        self.rank: Rank | None = None  # where it is now, or was last
        self.flight: Flight | None = None  # None while it waits for a worker or its KV cache is on the way
        self.handover: simpy.Event | None = None  # what its KV cache waits for, until there is room for it
        self.is_cancelled = False
        self.failure: str | None = None

    @property
    def num_output_tokens(self) -> int:
        """Tokens that its client has got."""
        if self.rank is None or self.flight is None or self.rank.role == "prefill":
            return self.num_tokens_before
        return self.num_tokens_before + self.flight.sequence.num_output_tokens


class GapLog(Protocol):
    """Who wants to know the times between tokens."""

    def add_gaps(self, gaps_s: NDArray[np.float64], num_sequences: int) -> None: ...


class UsageLog(Protocol):
    """Who wants to know what workers were like; KV usage is a share of a worker's blocks."""

    def add(
        self,
        start_s: float,
        end_s: float,
        num_running: float,
        num_waiting: float,
        start_usage: float,
        end_usage: float,
        num_output_tokens: float,
    ) -> None: ...


class Rank(RoutedLoad):
    """One engine of a worker, and the listener of its drive."""

    def __init__(
        self,
        worker: int,
        role: str,
        engine: Engine,
        clock: VirtualClock,
        gaps: GapLog,
        usage: UsageLog,
        on_finished: Callable[[Rank, Flight], None],
        observer: Observer | None,
        is_counting_prompts: bool,
    ) -> None:
        super().__init__(VirtualDrive(clock, engine.core, self, observer), is_counting_prompts)
        self.worker = worker
        self.role = role
        self.engine = engine
        self.observer = observer
        self.sends, self.receives = simpy.Resource(clock), simpy.Resource(clock)
        self.is_up = False
        self.num_output_tokens = 0
        self._gaps = gaps
        self._usage = usage
        self._on_finished = on_finished

    def finished(self, flight: Flight) -> None:
        self.remove(flight)
        self._on_finished(self, flight)

    def steps_done(self, stretch: Stretch) -> None:
        edges_s, num_decoding = stretch.edges_s, stretch.num_decoding
        num_tokens = num_decoding * (len(edges_s) - 1) + stretch.num_joining + stretch.num_extra_tokens
        if num_decoding:
            self._gaps.add_gaps(edges_s[1:] - edges_s[:-1], num_decoding)
        num_blocks = self.engine.num_blocks
        self.num_output_tokens += num_tokens
        self._usage.add(
            float(edges_s[0]),
            float(edges_s[-1]),
            stretch.num_running,
            stretch.num_waiting,
            stretch.start_blocks / num_blocks,
            stretch.end_blocks / num_blocks,
            num_tokens,
        )

    def gap_done(self, gap_s: float, num_sequences: int) -> None:
        self._gaps.add_gaps(np.array([gap_s]), num_sequences)


class Pool:
    """The ranks of one role, and the router before them."""

    def __init__(self, ranks: list[Rank], router: Router[Rank]) -> None:
        self.ranks = ranks
        self.up: list[Rank] = []
        self.router = router


class Deployment:
    """
    See the module. `on_end` is called when a job is finished, has failed, or is cancelled.

    `usage_of` gives, by role, who wants to know what the workers of that role were like.
    """

    def __init__(
        self,
        settings: DeploymentSettings,
        clock: VirtualClock,
        gaps: GapLog,
        usage_of: Callable[[str], UsageLog],
        on_end: Callable[[Job], None],
        observer_of: Callable[[int, int], Observer | None] = lambda _worker, _dp_rank: None,
        on_unmeasured: Callable[[str, StepLoad], None] = lambda _name, _load: None,
    ) -> None:
        self.settings = settings
        self.ranks: list[Rank] = []
        self._clock = clock
        self._on_end = on_end
        self.num_migrated = 0  # requests of lost workers that were sent again
        self.num_transfers = 0  # KV caches handed over
        self.transfer_s = 0.0  # that took, waiting for links included
        self._waiting: deque[Job] = deque()  # while no worker is up, of either role
        rng = np.random.default_rng([settings.groups[0].engine.seed, 1])
        for group in settings.groups:
            first_rank = len(self.ranks)
            first_seed = group.engine.seed + first_rank
            seeds = range(first_seed, first_seed + group.num_workers * settings.data_parallel_size)
            engines = build_engines(group.engine, seeds, partial(on_unmeasured, group.engine.profile))
            for rank, engine in enumerate(engines, first_rank):
                worker, dp_rank = divmod(rank, settings.data_parallel_size)
                self.ranks.append(
                    Rank(
                        worker,
                        group.role,
                        engine,
                        clock,
                        gaps,
                        usage_of(group.role),
                        self._rank_finished,
                        observer_of(worker, dp_rank),
                        settings.router.router_mode == "kv",
                    )
                )
        block_sizes = {rank.engine.block_size for rank in self.ranks}
        if len(block_sizes) > 1:
            raise ConfigError(
                f"the workers have KV blocks of {' and '.join(map(str, sorted(block_sizes)))} tokens; "
                f"a router needs one size. Set it with --block-size."
            )
        self.block_size = block_sizes.pop()
        worker_of = (lambda rank: rank.worker) if settings.data_parallel_size > 1 else None
        self._pools = {
            role: Pool([rank for rank in self.ranks if rank.role == role], make_router(settings.router, rng, worker_of))
            for role in ROLES
            if any(rank.role == role for rank in self.ranks)
        }
        self._entry = self._pools.get("agg") or self._pools["prefill"]
        for worker in range(settings.num_workers):
            clock.call_at(settings.start_s(worker), lambda _, worker=worker: self._start(worker))  # type: ignore[misc]
        for worker, time_s in settings.losses_s.items():
            clock.call_at(time_s, lambda _, worker=worker: self._lose(worker))  # type: ignore[misc]

    @property
    def max_model_len(self) -> int:
        """The longest request that every worker can serve."""
        return min(rank.engine.scheduler.max_model_len for rank in self.ranks)

    def submit(self, job: Job) -> None:
        """A client sends `job` now."""
        ingress_s = self._entry.ranks[0].engine.profile.overhead_before_queue_s(job.isl_tokens)
        if ingress_s and self.settings.has_ingress:
            self._clock.call_at(self._clock.now + ingress_s, lambda _: self._route(job))
        else:
            self._route(job)

    def cancel(self, job: Job) -> None:
        """Its client has gone. A no-op once it has ended."""
        if job.is_cancelled or job.failure is not None or job.last_token_s is not None:
            return
        job.is_cancelled = True
        if job.flight is not None:
            self._withdraw(job, job.flight)
        _stop_waiting(job)
        self._on_end(job)

    def close(self) -> None:
        """The run is over: what still waits for a worker never gets one."""
        while self._waiting:
            job = self._waiting.popleft()
            if not job.is_cancelled:
                self._fail(job, "no worker was up to take it")

    @property
    def _is_up(self) -> bool:
        """Whether there is a worker for each part of a request."""
        return all(pool.up for pool in self._pools.values())

    def _route(self, job: Job) -> None:
        if job.is_cancelled:
            return
        if not self._is_up:
            self._waiting.append(job)
            return
        request = self._request(self._entry, job)
        self._send(self._entry.router(request, self._entry.up), request, job)

    def _request(self, pool: Pool, job: Job) -> Request:
        """What the job still needs, from a worker of this pool."""
        name = str(job.number)
        isl_tokens, osl_tokens = job.isl_tokens + job.num_tokens_before, job.osl_tokens - job.num_tokens_before
        if pool is self._pools.get("prefill"):
            return Request(name, isl_tokens, 1, job.block_hashes, keeps_blocks=True)
        if pool is self._pools.get("decode"):
            return Request(name, isl_tokens, osl_tokens, job.block_hashes, num_remote_tokens=isl_tokens - 1)
        return Request(name, isl_tokens, osl_tokens, job.block_hashes)

    def _send(self, rank: Rank, request: Request, job: Job) -> None:
        flight = self._prepare(rank, request, job)
        if flight is not None:
            self._enqueue(rank, flight, job)

    def _prepare(self, rank: Rank, request: Request, job: Job) -> Flight | None:
        """None, and the job has failed, if that worker can never serve it."""
        try:
            return rank.drive.prepare(request, job)
        except RequestError:
            self._fail(job, f"longer than the context length of {rank.engine.scheduler.max_model_len} tokens")
            return None

    def _enqueue(self, rank: Rank, flight: Flight, job: Job) -> None:
        job.rank, job.flight = rank, flight
        rank.drive.enqueue(flight)
        rank.add(flight)

    def _rank_finished(self, rank: Rank, flight: Flight) -> None:
        job: Job = flight.owner
        self._note_left(job, flight)
        if rank.role == "prefill":
            job.flight = None
            self._clock.process(self._hand_over(rank, flight, job))
            return
        job.last_token_s = flight.last_token_s
        job.flight = None
        self._on_end(job)

    def _withdraw(self, job: Job, flight: Flight) -> None:
        """Take a job off its worker before it is done. The tokens that it has got until now stay got."""
        assert job.rank is not None
        job.rank.drive.cancel(flight)  # which also counts the steps that are over by now
        job.rank.remove(flight)
        self._note_left(job, flight)
        job.num_tokens_before = job.num_output_tokens
        job.flight = None

    def _note_left(self, job: Job, flight: Flight) -> None:
        """Take down what a worker has done for a job, before it goes on or ends."""
        sequence = flight.sequence
        job.num_preemptions += sequence.num_preemptions
        if job.rank is not None and job.rank.role != "decode" and not job.num_tries:
            job.num_cached_tokens = sequence.num_cached_tokens or 0
        if job.rank is not None and job.rank.role != "prefill":
            if job.first_token_s is None:
                job.first_token_s, job.second_token_s = flight.first_token_s, flight.second_token_s
            elif job.second_token_s is None:
                job.second_token_s = flight.first_token_s

    def _hand_over(self, source: Rank, flight: Flight, job: Job) -> Generator[simpy.Event, object, None]:
        """Bring the KV cache of a prompt to a decode worker."""
        pool = self._pools["decode"]
        if not pool.up:
            self._lost(job)  # nobody to take it; it starts again when somebody is
            self._give_back(source, flight)
            return
        request = self._request(pool, job)
        target = pool.router(request, pool.up)
        arriving = self._prepare(target, request, job)
        if arriving is None:
            self._give_back(source, flight)
            return
        num_tokens = job.isl_tokens + job.num_tokens_before
        if self.settings.kv_transfer_timing_mode == "destination_missing":
            num_tokens -= target.num_overlap_blocks(request) * self.block_size
        begin_s = self._clock.now

        def is_wanted() -> bool:
            return source.is_up and target.is_up and not job.is_cancelled

        job.handover = self._clock.event()
        target.drive.want(arriving, partial(_stop_waiting, job))
        yield job.handover
        job.handover = None
        if is_wanted():
            with source.sends.request() as send:
                yield send
                with target.receives.request() as receive:
                    yield receive
                    if is_wanted():  # still, after the wait for the links
                        if source.observer is not None:
                            num_bytes = num_tokens * source.engine.profile.kv_bytes_per_token
                            source.observer.sending(flight, self._clock.now, num_bytes)
                        yield self._clock.timeout(
                            transfer_s(num_tokens, source.engine.profile, self.settings.kv_transfer_bandwidth)
                        )
        self._give_back(source, flight)
        if is_wanted():
            self.num_transfers += 1
            self.transfer_s += self._clock.now - begin_s
            self._enqueue(target, arriving, job)
            return
        target.drive.cancel(arriving)
        if not job.is_cancelled:
            self._lost(job)

    def _give_back(self, source: Rank, flight: Flight) -> None:
        source.drive.give_back(flight)
        if source.observer is not None:
            source.observer.sent(flight, self._clock.now)

    def _start(self, worker: int) -> None:
        for rank in self.ranks:
            if rank.worker == worker:
                rank.is_up = True
                pool = self._pools[rank.role]
                pool.up = [other for other in pool.ranks if other.is_up]
        while self._is_up and self._waiting:
            self._route(self._waiting.popleft())

    def _lose(self, worker: int) -> None:
        """A worker dies: its KV cache is gone, and its requests go elsewhere or fail."""
        lost: list[Job] = []
        for rank in self.ranks:
            if rank.worker == worker and rank.is_up:
                rank.is_up = False
                pool = self._pools[rank.role]
                pool.up = [other for other in pool.ranks if other.is_up]
                for flight in rank.drive.wanting:
                    _stop_waiting(flight.owner)
                for flight in list(rank.drive.flights.values()):
                    self._withdraw(flight.owner, flight)
                    lost.append(flight.owner)
        for job in lost:
            self._lost(job)

    def _lost(self, job: Job) -> None:
        """Its worker is gone: what it has got so far becomes part of its prompt, and it is sent again."""
        if job.num_tries >= self.settings.migration_limit:
            self._fail(job, "its worker was lost")
            return
        job.num_tries += 1
        self.num_migrated += 1
        self._route(job)

    def _fail(self, job: Job, reason: str) -> None:
        job.failure = reason
        self._on_end(job)


def _stop_waiting(job: Job) -> None:
    """There is room for its KV cache, or nobody wants it any more: let `_hand_over` look."""
    if job.handover is not None and not job.handover.triggered:
        job.handover.succeed()
