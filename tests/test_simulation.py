"""A simulation as a whole: whatever is deployed and sent, nothing is lost, counted twice or left behind."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mock_engine import simulation
from mock_engine.clients import Conversation
from mock_engine.deployment import DeploymentSettings, Job
from mock_engine.drive_virtual import Flight
from mock_engine.errors import ConfigError
from mock_engine.router_settings import RouterSettings
from mock_engine.sequence import SequenceState
from mock_engine.simulation import SimulationSettings, simulate
from mock_engine.simulation_results import RequestLog
from mock_engine.workload import Workload
from tests.helpers.deployments import (
    A100,
    aggregated,
    check_that_nothing_is_left,
    decode_s,
    disaggregated,
    prefill_s,
    simulations,
    small_engine,
    watch,
)

ROOT = Path(__file__).parents[1]


@given(plan=simulations())
@settings(max_examples=200)
def test_every_request_ends_once_and_nothing_of_it_is_left(plan):
    watched = watch(plan)
    check_that_nothing_is_left(watched)
    results = watched.results
    assert results.num_sent == len(watched.jobs)
    assert results.num_sent == results.num_finished + results.num_cancelled + results.num_failed
    assert results.num_finished == len(watched.finished)
    assert results.num_cancelled == sum(job.is_cancelled for job in watched.jobs)
    assert results.num_failed == sum(job.failure is not None for job in watched.jobs)
    for job in watched.jobs:
        assert [job.last_token_s is not None, job.is_cancelled, job.failure is not None].count(True) == 1
        assert not job.is_cancelled or plan.workload.request_cancellation_rate
    assert results.preemptions == sum(rank.engine.core.scheduler.num_preemptions for rank in watched.deployment.ranks)


@given(plan=simulations())
@settings(max_examples=200)
def test_no_token_is_lost_or_made_twice_and_times_are_in_order(plan):
    """Also where a worker is lost in the middle of an answer, and another goes on with it."""
    watched = watch(plan)
    num_got = sum(job.osl_tokens if job.last_token_s is not None else job.num_tokens_before for job in watched.jobs)
    num_made = sum(rank.num_output_tokens for rank in watched.deployment.ranks if rank.role != "prefill")
    assert num_made == num_got
    results = watched.results
    assert results.num_tokens_made == num_got
    num_finished_tokens = sum(job.osl_tokens for job in watched.finished)
    assert results.output_tokens_per_gpu_s * results.gpu_hours * 3600 == pytest.approx(num_finished_tokens)
    for job in watched.jobs:
        assert job.num_tokens_before < job.osl_tokens
        assert job.num_tries <= plan.deployment.migration_limit
        if job.num_tokens_before:
            assert job.first_token_s <= watched.deployment.ended_s[job]
            assert job.num_tries or job.last_token_s is None
    for job in watched.finished:
        second_s = job.first_token_s if job.osl_tokens == 1 else job.second_token_s
        assert job.sent_s < job.first_token_s <= second_s <= job.last_token_s
        assert (job.osl_tokens > 1) == (job.first_token_s < second_s)
        assert (job.osl_tokens > 2) == (second_s < job.last_token_s)
        assert job.last_token_s == watched.deployment.ended_s[job]
        assert job.num_cached_tokens < job.isl_tokens


@given(plan=simulations())
@settings(max_examples=120)
def test_littles_law_holds_for_every_run(plan):
    """
    Requests under way on average, times the time of the run, are the latencies of all requests together.

    Source: J. D. C. Little, A Proof for the Queuing Formula L = lambda W, Operations Research 9 (1961). Over a run
    that begins and ends empty it is an identity, whatever is cancelled or fails.
    """
    watched = watch(plan)
    results = watched.results
    latencies_s = sum(watched.latency_s(job) for job in watched.jobs)
    assert results.avg_requests_under_way * results.simulated_s == pytest.approx(latencies_s, abs=1e-9)
    assert results.simulated_s == max(watched.deployment.ended_s.values())
    assert results.gpu_hours * 3600 <= results.num_gpus * results.simulated_s * (1 + 1e-12)
    if results.num_finished:
        metrics = results.metrics
        finished_s = sum(watched.latency_s(job) for job in watched.finished)
        assert metrics["request_latency"]["avg"] * results.num_finished == pytest.approx(finished_s * 1e3, abs=1e-4)
        assert metrics["time_to_first_token"]["max"] <= metrics["request_latency"]["max"]


def busy(seed: int = 0) -> SimulationSettings:
    """A bit of everything."""
    return SimulationSettings(
        disaggregated(
            2,
            2,
            small_engine(seed=seed, jitter=0.1),
            small_engine(seed=seed, jitter=0.1, profile=A100),
            data_parallel_size=2,
            losses_s={3: 0.4},
            migration_limit=1,
        ),
        Workload(
            isl=10,
            osl=10,
            osl_stddev=4.0,
            request_rate=100.0,
            request_count=80,
            conversation_turn_mean=2,
            request_cancellation_rate=20.0,
            request_cancellation_delay=0.05,
            random_seed=seed,
        ),
    )


def test_the_same_seed_gives_the_same_bytes_in_any_process_and_another_seed_does_not():
    code = "import json, tests.test_simulation as t; print(json.dumps(t.simulate(t.busy()).to_json()))"
    here = json.dumps(simulate(busy()).to_json())
    assert here == json.dumps(simulate(busy()).to_json())
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        there = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True, text=True
        )
        assert there.stdout.strip() == here
    assert json.dumps(simulate(busy(seed=1)).to_json()) != here


@pytest.mark.parametrize("what", ["engine", "workload"])
def test_each_of_the_two_seeds_changes_what_happens(what):
    """The engine's: how long each step takes. The load's: lengths, arrivals, and who is cancelled."""
    both, neither = busy(seed=1), busy(seed=0)
    one = replace(both, **({"workload": neither.workload} if what == "engine" else {"deployment": neither.deployment}))
    assert len({json.dumps(simulate(each).to_json()) for each in (both, neither, one)}) == 3


def test_the_run_ends_with_its_last_request_whatever_else_was_to_happen_later():
    """A worker to be lost, one to start, a client that would have gone, a limit to be raised: all too late."""
    deployment = aggregated(2, starts_s={1: 50.0}, losses_s={0: 60.0})
    workload = Workload(
        isl=8,
        osl=4,
        concurrency=3,
        request_count=4,
        concurrency_ramp_duration=90.0,
        request_cancellation_rate=100.0,
        request_cancellation_delay=70.0,
    )
    results = simulate(SimulationSettings(deployment, workload))
    one_s = prefill_s(8) + decode_s(9) + decode_s(10) + decode_s(11)
    assert results.num_finished == 4
    assert results.simulated_s == pytest.approx(4 * one_s)
    assert results.gpu_hours == pytest.approx(4 * one_s / 3600)
    assert results.avg_requests_under_way == pytest.approx(1.0)


def test_a_cancelled_request_does_not_leave_its_planned_end_behind():
    """Steps up to its last token were one event; the run ends when its client goes, not there."""
    workload = Workload(isl=8, osl=80, request_count=1, request_cancellation_rate=100, request_cancellation_delay=0.1)
    watched = watch(SimulationSettings(aggregated(), workload))
    assert watched.results.simulated_s == 0.1
    [job] = watched.jobs
    steps_s = [prefill_s(8)] + [decode_s(8 + number) for number in range(1, 80)]
    num_over = next(number for number in range(80) if sum(steps_s[: number + 1]) >= 0.1)
    assert job.num_tokens_before == num_over


def test_clients_without_end_do_not_keep_sending_to_workers_that_are_all_gone():
    """They send for a minute; at 0.2 s nobody is left to answer, and no time passes any more."""
    workload = Workload(isl=8, osl=16, concurrency=4, benchmark_duration=60.0)
    watched = watch(SimulationSettings(aggregated(losses_s={0: 0.2}), workload))
    check_that_nothing_is_left(watched)
    results = watched.results
    assert results.failures == {"its worker was lost": 4, "no worker was up to take it": 4}
    assert 0.2 <= results.simulated_s < 0.25


def test_who_is_cancelled_while_all_wait_for_a_worker_has_not_also_failed():
    workload = Workload(
        isl=8,
        osl=4,
        request_rate=100.0,
        request_count=50,
        request_cancellation_rate=50,
        request_cancellation_delay=0.01,
    )
    watched = watch(SimulationSettings(aggregated(losses_s={0: 0.0}), workload))
    check_that_nothing_is_left(watched)
    results = watched.results
    assert results.num_finished == 0
    assert results.num_cancelled > 0
    assert results.failures == {"no worker was up to take it": 50 - results.num_cancelled}


def test_gpu_hours_count_each_gpu_from_when_its_worker_serves_to_when_it_is_lost():
    tp4 = small_engine(profile="a100-sxm/llama-3.1-70b/vllm-tp4-bf16")
    deployment = DeploymentSettings(
        (*aggregated(2).groups, *aggregated(1, tp4).groups),
        data_parallel_size=2,
        starts_s={1: 0.1},
        losses_s={2: 0.3},
        migration_limit=1,
    )
    results = simulate(SimulationSettings(deployment, Workload(isl=8, osl=64, request_count=12, request_rate=20.0)))
    assert results.num_gpus == 2 * (1 + 1 + 4)
    end_s = results.simulated_s
    assert results.gpu_hours == pytest.approx(2 * (end_s + (end_s - 0.1) + 4 * 0.3) / 3600)
    assert results.output_tokens_per_gpu_s == pytest.approx(12 * 64 / (results.gpu_hours * 3600))


class QuietLog(RequestLog):
    """Counts, and keeps no figures: those that wait for their file come and go by the megabyte."""

    def add(self, *_):
        self.num_finished += 1

    def add_gaps(self, *_):
        pass

    def metrics(self):
        return {}


def test_memory_does_not_grow_with_the_number_of_requests(monkeypatch):
    """Nothing is kept of a request that has ended: 15,000 more take less than a byte each."""
    monkeypatch.setattr(simulation, "RequestLog", QuietLog)

    def peak_bytes(num_requests: int) -> int:
        workload = Workload(isl=8, osl=2, osl_stddev=1.0, concurrency=12, request_count=num_requests)
        tracemalloc.start()
        try:
            assert simulate(SimulationSettings(aggregated(2), workload)).num_finished == num_requests
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak_bytes(20_000)  # whatever is made once, for whatever batch
    assert peak_bytes(35_000) - peak_bytes(20_000) < 15_000  # fewer do not fill what is set aside for the state log


@pytest.mark.parametrize(
    "deployment",
    [
        aggregated(2, router=RouterSettings("kv")),
        disaggregated(2, 2, starts_s={2: 0.5}, losses_s={3: 1.0}, migration_limit=1),
    ],
    ids=["aggregated", "disaggregated"],
)
def test_no_more_requests_are_in_memory_than_are_under_way(deployment):
    """Clients may go away after 50 ms: until then their request is known, though it may have ended."""
    kinds = (Job, Flight, Conversation, SequenceState)
    most = dict.fromkeys(kinds, 0)
    gc.collect()
    of_others = Counter(map(type, gc.get_objects()))

    def look(*_: object) -> None:
        alive = Counter(map(type, gc.get_objects()))
        most.update({kind: max(most[kind], alive[kind] - of_others[kind]) for kind in kinds})

    workload = Workload(
        isl=8,
        osl=4,
        osl_stddev=1.0,
        concurrency=12,
        request_count=2000,
        request_cancellation_rate=30,
        request_cancellation_delay=0.05,
    )
    simulate(SimulationSettings(deployment, workload), on_progress=look)
    assert min(most.values()) > 0
    assert max(most.values()) <= 3 * 12


def test_progress_is_reported_on_the_way():
    seen = []
    workload = Workload(isl=8, osl=2, request_count=1000, concurrency=4)
    results = simulate(
        SimulationSettings(aggregated(), workload), on_progress=lambda num_ended, now_s: seen.append((num_ended, now_s))
    )
    assert [num_ended for num_ended, _ in seen] == [256, 512, 768]
    assert sorted(seen) == seen
    assert seen[-1][1] < results.simulated_s


def test_a_request_that_no_worker_can_serve_is_refused_at_once_if_all_are_like_it():
    with pytest.raises(ConfigError, match="--isl 90 and --osl 7 are 97 tokens; the context length is 96"):
        simulate(SimulationSettings(aggregated(), Workload(isl=90, osl=7, request_count=1)))


@given(seed=st.integers(0, 100), concurrency=st.integers(1, 3))
@settings(max_examples=20)
def test_requests_that_are_too_long_fail_and_the_others_do_not(seed, concurrency):
    workload = Workload(isl=60, isl_stddev=30.0, osl=8, concurrency=concurrency, request_count=30, random_seed=seed)
    watched = watch(SimulationSettings(aggregated(), workload))
    check_that_nothing_is_left(watched)
    for job in watched.jobs:
        assert (job.failure is not None) == (job.isl_tokens + job.osl_tokens > 96)
        assert job.failure in (None, "longer than the context length of 96 tokens")
