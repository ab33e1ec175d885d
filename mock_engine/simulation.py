"""
A deployment under a load, in virtual time, from the first request to the last.

    results = simulate(SimulationSettings(deployment, workload))
    results.metrics["time_to_first_token"]["p99"]

The same settings give the same results, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from numpy.random import default_rng

from mock_engine.aiperf_schema import Metric
from mock_engine.clients import Clients, ClientSettings, Conversation
from mock_engine.deployment import Deployment, DeploymentSettings, Job, UsageLog
from mock_engine.drive_virtual import Observer, VirtualClock
from mock_engine.simulation_results import RequestLog
from mock_engine.slos import Slo
from mock_engine.speculation import SpeculationCounts
from mock_engine.state_log import StateLog, Timeline, Usage
from mock_engine.step import StepLoad
from mock_engine.workload import Workload

_PROGRESS_EVERY = 256  # ended requests
_KEEPS_UP = 0.9  # answered of offered; the rest is what the last requests take after the last was sent


@dataclass(frozen=True, slots=True)
class SimulationSettings:
    """All that the results depend on."""

    deployment: DeploymentSettings
    workload: Workload
    slos: tuple[Slo, ...] = ()
    client_turnaround_s: float = 0.0  # from the end of an answer until its client sends again


@dataclass(frozen=True, slots=True)
class SimulationResults:
    """What came out. `metrics` are AIPerf's, in its schema; empty if no request was answered."""

    metrics: dict[str, Metric]
    simulated_s: float
    num_sent: int
    num_finished: int
    num_cancelled: int
    failures: dict[str, int]  # reason -> requests
    usage: Usage | None
    timeline: Timeline
    usage_by_role: dict[str, Usage]  # of disaggregated serving; of one role alone there is nothing to tell apart
    avg_transfer_s: float | None  # from a computed prompt until its KV cache is with a decode worker
    num_migrated: int
    is_closed_loop: bool
    last_sent_s: float
    too_late: list[str]  # what was to happen to workers after the last request had ended
    avg_requests_under_way: float
    preemptions: int
    prefix_cache_hit_rate: float
    num_gpus: int
    gpu_hours: float
    output_tokens_per_gpu_s: float  # of requests that were answered to the end
    num_tokens_made: int  # of all requests
    total_kv_blocks: int  # of all engines together
    num_steps: int
    speculation: SpeculationCounts | None  # of all engines together; None if none speculates
    unmeasured: dict[str, StepLoad]  # profile -> the first load that lies outside what it measured

    @property
    def num_failed(self) -> int:
        return sum(self.failures.values())

    @property
    def offered_rate(self) -> float | None:
        """Requests a second that were sent while any were; None where each waited for another, or all came at once."""
        return None if self.is_closed_loop or not self.last_sent_s else self.num_sent / self.last_sent_s

    @property
    def answered_rate(self) -> float:
        """Requests a second that were answered, from the start to the end of the last."""
        return self.num_finished / self.simulated_s if self.simulated_s else 0.0

    @property
    def keeps_up(self) -> bool:
        """Whether requests were answered nearly as fast as they were sent: neither overloaded, nor over too soon."""
        return self.offered_rate is None or self.answered_rate >= _KEEPS_UP * self.offered_rate

    def to_json(self) -> dict[str, Any]:
        """AIPerf's export, and beside it what only a simulation knows."""
        usage = self.usage
        return {
            **self.metrics,
            "simulated_s": self.simulated_s,
            "requests": {
                "sent": self.num_sent,
                "finished": self.num_finished,
                "cancelled": self.num_cancelled,
                "failed": self.num_failed,
            },
            "failures": self.failures,
            "migrated": self.num_migrated,
            "offered_rate": self.offered_rate,
            "answered_rate": self.answered_rate,
            "keeps_up": self.keeps_up,
            "by_role": {role: asdict(usage) for role, usage in self.usage_by_role.items()},
            "avg_kv_transfer_s": self.avg_transfer_s,
            "avg_requests_under_way": self.avg_requests_under_way,
            "avg_requests_running": usage.avg_num_running if usage else 0.0,
            "avg_requests_waiting": usage.avg_num_waiting if usage else 0.0,
            "max_requests_waiting": usage.max_num_waiting if usage else 0.0,
            "kv_usage": {"avg": usage.avg_kv_usage, "max": usage.max_kv_usage} if usage else {"avg": 0.0, "max": 0.0},
            "preemptions": self.preemptions,
            "prefix_cache_hit_rate": self.prefix_cache_hit_rate,
            "num_gpus": self.num_gpus,
            "gpu_hours": self.gpu_hours,
            "output_tokens_per_gpu_s": self.output_tokens_per_gpu_s,
            "output_tokens_made": self.num_tokens_made,
            "total_kv_blocks": self.total_kv_blocks,
            "num_steps": self.num_steps,
            "speculative_decoding": self.speculation.to_json() if self.speculation else None,
            "queue_depth": {
                "bin_s": self.timeline.bin_s,
                "num_waiting": self.timeline.num_waiting.tolist(),
                "num_running": self.timeline.num_running.tolist(),
                "kv_usage": self.timeline.kv_usage.tolist(),
            },
        }


@dataclass(slots=True)
class _Books:
    """Everything that is written down while it runs."""

    requests: RequestLog
    states: StateLog
    states_by_role: dict[str, StateLog]
    clients: Clients | None = None
    failures: dict[str, int] = field(default_factory=dict)
    unmeasured: dict[str, StepLoad] = field(default_factory=dict)
    ended_s: float = 0.0  # when the last request did; what the clock does then is nobody's concern


class _Both:
    """Two logs that are told the same."""

    def __init__(self, first: StateLog, second: StateLog) -> None:
        self._logs = first, second

    def add(self, *stretch: float) -> None:
        for log in self._logs:
            log.add(*stretch)


def unobserved(_worker: int, _dp_rank: int) -> None:
    """Nobody watches any engine."""


def simulate(
    settings: SimulationSettings,
    requests_out: Path | None = None,
    observer_of: Callable[[int, int], Observer | None] = unobserved,
    on_progress: Callable[[int, float], None] = lambda _num_ended, _now_s: None,
) -> SimulationResults:
    """
    Run it to the end. Raises `ConfigError` for settings or a trace that cannot be.

    `on_progress` is called now and then, with the number of requests that have ended and the simulated time.
    """
    workload = settings.workload
    clock = VirtualClock()
    plan = settings.deployment
    num_ranks = plan.num_workers * plan.data_parallel_size
    by_role = {group.role: StateLog(group.num_workers * plan.data_parallel_size) for group in plan.groups}
    books = _Books(RequestLog(settings.slos, requests_out), StateLog(num_ranks), by_role if len(by_role) > 1 else {})

    def usage_of(role: str) -> UsageLog:
        return _Both(books.states, books.states_by_role[role]) if books.states_by_role else books.states

    def job_ended(job: Job) -> None:
        _write_down(books, job, clock.now)
        books.ended_s = clock.now
        assert books.clients is not None
        books.clients.job_ended(job)
        num_ended = books.clients.num_sent - books.clients.num_under_way
        if num_ended % _PROGRESS_EVERY == 0:
            on_progress(num_ended, clock.now)

    deployment = Deployment(
        settings.deployment,
        clock,
        books.requests,
        usage_of,
        job_ended,
        observer_of,
        lambda profile, load: books.unmeasured.update({profile: load}),
    )
    workload.check_fits(deployment.max_model_len)
    books.clients = Clients(
        clock,
        workload.sessions(deployment.block_size),
        deployment.submit,
        deployment.cancel,
        ClientSettings(
            max_concurrency=workload.max_concurrency,
            ramp_s=workload.concurrency_ramp_duration or 0.0,
            end_s=workload.benchmark_duration or float("inf"),
            turnaround_s=settings.client_turnaround_s,
            cancelled_share=(workload.request_cancellation_rate or 0.0) / 100,
            cancel_after_s=workload.request_cancellation_delay or 0.0,
        ),
        default_rng([workload.random_seed or 0, 2]),
    )
    books.clients.start()
    try:
        clock.run()
        books.clients.stop()
        deployment.close()
    finally:
        books.requests.close()
    return _results(settings, books, deployment, books.ended_s)


def _write_down(books: _Books, job: Job, now_s: float) -> None:
    conversation = job.client
    assert isinstance(conversation, Conversation)
    worker = job.rank.worker if job.rank else 0
    is_single = len(conversation.session.turns) == 1
    session_id = None if is_single else f"session-{conversation.number}"
    turn_index = None if is_single else conversation.turn_index
    if job.failure is not None:
        books.failures[job.failure] = books.failures.get(job.failure, 0) + 1
    if job.last_token_s is None:
        books.requests.add_cancelled(
            f"request-{job.number}",
            job.sent_s,
            now_s,
            job.isl_tokens,
            job.num_tokens_before,
            job.num_cached_tokens,
            job.num_preemptions,
            worker,
            session_id,
            turn_index,
            job.failure or "",
        )
        return
    assert job.first_token_s is not None
    books.requests.add(
        f"request-{job.number}",
        job.sent_s,
        job.first_token_s,
        job.first_token_s if job.second_token_s is None else job.second_token_s,
        job.last_token_s,
        job.isl_tokens,
        job.osl_tokens,
        job.num_cached_tokens,
        job.num_preemptions,
        worker,
        session_id,
        turn_index,
    )


def _results(settings: SimulationSettings, books: _Books, deployment: Deployment, now_s: float) -> SimulationResults:
    clients = books.clients
    assert clients is not None
    schedulers = [rank.engine.core.scheduler for rank in deployment.ranks]
    # A decode worker is given what it does not find: it looks, but has nothing to save.
    looking = [rank.engine.core.scheduler for rank in deployment.ranks if rank.role != "decode"]
    queries = sum(scheduler.num_prefix_queries_tokens for scheduler in looking)
    hits = sum(scheduler.num_prefix_hits_tokens for scheduler in looking)
    counts = [scheduler.speculation_counts for scheduler in schedulers if scheduler.speculation_counts is not None]
    plan = settings.deployment
    gpu_s = 0.0
    for rank in deployment.ranks:
        end_s = min(plan.losses_s.get(rank.worker, now_s), now_s)
        gpu_s += rank.engine.profile.tp * max(0.0, end_s - plan.start_s(rank.worker))
    metrics = books.requests.metrics()
    num_tokens = metrics["total_output_tokens"]["avg"] if "total_output_tokens" in metrics else 0.0
    events = [("lost", plan.losses_s), ("to serve", plan.starts_s)]
    too_late = [
        f"worker {worker} was to be {what} at {time_s:g} s"
        for what, times_s in events
        for worker, time_s in sorted(times_s.items())
        if time_s > now_s
    ]
    usages = {role: states.usage() for role, states in books.states_by_role.items()}
    return SimulationResults(
        metrics=metrics,
        simulated_s=now_s,
        num_sent=clients.num_sent,
        num_finished=books.requests.num_finished,
        num_cancelled=books.requests.num_cancelled - sum(books.failures.values()),
        failures=books.failures,
        usage=books.states.usage(),
        timeline=books.states.timeline(),
        usage_by_role={role: usage for role, usage in usages.items() if usage},
        avg_transfer_s=deployment.transfer_s / deployment.num_transfers if deployment.num_transfers else None,
        num_migrated=deployment.num_migrated,
        is_closed_loop=clients.is_closed_loop,
        last_sent_s=clients.last_sent_s,
        too_late=too_late,
        avg_requests_under_way=clients.request_seconds / now_s if now_s else 0.0,
        preemptions=sum(scheduler.num_preemptions for scheduler in schedulers),
        prefix_cache_hit_rate=hits / queries if queries else 0.0,
        num_gpus=sum(rank.engine.profile.tp for rank in deployment.ranks),
        gpu_hours=gpu_s / 3600,
        output_tokens_per_gpu_s=num_tokens / gpu_s if gpu_s else 0.0,
        num_tokens_made=sum(rank.num_output_tokens for rank in deployment.ranks if rank.role != "prefill"),
        total_kv_blocks=sum(rank.engine.num_blocks for rank in deployment.ranks),
        num_steps=sum(scheduler.num_steps for scheduler in schedulers),
        speculation=SpeculationCounts.total(counts) if counts else None,
        unmeasured=books.unmeasured,
    )
