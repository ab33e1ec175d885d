"""
A deployment under a load, in virtual time, from the first request to the last.

    results = simulate(SimulationSettings(deployment, workload))
    results.metrics["time_to_first_token"]["p99"]

The same settings give the same results, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.random import default_rng

from mock_engine.aiperf_schema import Metric
from mock_engine.clients import Clients, ClientSettings, Conversation
from mock_engine.deployment import Deployment, DeploymentSettings, Job
from mock_engine.drive_virtual import Observer, VirtualClock
from mock_engine.simulation_results import RequestLog
from mock_engine.slos import Slo
from mock_engine.state_log import StateLog, Timeline, Usage
from mock_engine.step import StepLoad
from mock_engine.workload import Workload

_DEFAULT_CANCEL_AFTER_S = 0.0
_PROGRESS_EVERY = 256  # ended requests


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
    avg_requests_under_way: float
    preemptions: int
    prefix_cache_hit_rate: float
    num_gpus: int
    gpu_hours: float
    output_tokens_per_gpu_s: float
    total_kv_blocks: int  # of all engines together
    num_steps: int
    unmeasured: dict[str, StepLoad]  # profile -> the first load that lies outside what it measured

    @property
    def num_failed(self) -> int:
        return sum(self.failures.values())

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
            "total_kv_blocks": self.total_kv_blocks,
            "num_steps": self.num_steps,
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
    clients: Clients | None = None
    failures: dict[str, int] = field(default_factory=dict)
    unmeasured: dict[str, StepLoad] = field(default_factory=dict)
    ended_s: float = 0.0  # when the last request did; what the clock does then is nobody's concern


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
    num_ranks = settings.deployment.num_workers * settings.deployment.data_parallel_size
    books = _Books(RequestLog(settings.slos, requests_out), StateLog(num_ranks))

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
        books.states,
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
            cancel_after_s=workload.request_cancellation_delay or _DEFAULT_CANCEL_AFTER_S,
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
    queries = sum(scheduler.num_prefix_queries_tokens for scheduler in schedulers)
    hits = sum(scheduler.num_prefix_hits_tokens for scheduler in schedulers)
    plan = settings.deployment
    gpu_s = 0.0
    for rank in deployment.ranks:
        end_s = min(plan.losses_s.get(rank.worker, now_s), now_s)
        gpu_s += rank.engine.profile.tp * max(0.0, end_s - plan.start_s(rank.worker))
    num_tokens = sum(rank.num_output_tokens for rank in deployment.ranks if rank.role != "prefill")
    return SimulationResults(
        metrics=books.requests.metrics(),
        simulated_s=now_s,
        num_sent=clients.num_sent,
        num_finished=books.requests.num_finished,
        num_cancelled=books.requests.num_cancelled - sum(books.failures.values()),
        failures=books.failures,
        usage=books.states.usage(),
        timeline=books.states.timeline(),
        avg_requests_under_way=clients.request_seconds / now_s if now_s else 0.0,
        preemptions=sum(scheduler.num_preemptions for scheduler in schedulers),
        prefix_cache_hit_rate=hits / queries if queries else 0.0,
        num_gpus=sum(rank.engine.profile.tp for rank in deployment.ranks),
        gpu_hours=gpu_s / 3600,
        output_tokens_per_gpu_s=num_tokens / gpu_s if gpu_s else 0.0,
        total_kv_blocks=sum(rank.engine.num_blocks for rank in deployment.ranks),
        num_steps=sum(scheduler.num_steps for scheduler in schedulers),
        unmeasured=books.unmeasured,
    )
