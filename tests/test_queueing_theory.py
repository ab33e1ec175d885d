"""
Where a deployment reduces to a queue that has been solved, it does what the solution says.

One output token and one sequence at a time make an engine a server of constant service time: a prefill step.
Requests at a Poisson rate then wait as in M/D/1; behind a limit of c requests under way, with c
idle-or-busy workers, those that wait do it at the client, in one queue: M/D/c.
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mock_engine.clients import ClientSettings
from mock_engine.engine_settings import EngineSettings
from mock_engine.router_settings import ROUTER_MODES, RouterSettings
from mock_engine.simulation import SimulationSettings
from mock_engine.workload import Workload
from tests.helpers.deployments import (
    H100,
    aggregated,
    decode_s,
    disaggregated,
    prefill_s,
    send,
    single,
    transfer_bandwidth,
    watch,
)

ISL = 512
SERVICE_S = prefill_s(ISL)
ONE_AT_A_TIME = EngineSettings(H100, max_num_seqs=1, jitter=0.0)
NUM_BATCHES = 30


def one_token_each(num_requests: int, rate: float, **load) -> Workload:
    return Workload(isl=ISL, osl=1, request_count=num_requests, request_rate=rate, **load)


def wait_s(job) -> float:
    """From the moment when the client wanted to send it, to when it was served."""
    return job.first_token_s - job.client.session.arrival_s - SERVICE_S


def check_mean(values, expected: float, precision: float) -> None:
    """
    The mean is as expected, to 4 standard errors, and the run is long enough to tell: one is less than `precision` of
    it. Consecutive waits are not independent; means of long batches nearly are.

    Source: A. M. Law, Simulation Modeling and Analysis, 5th edition (2015), on batch means.
    """
    num = len(values) // NUM_BATCHES
    means = np.asarray(values[: num * NUM_BATCHES]).reshape(NUM_BATCHES, num).mean(axis=1)
    error = means.std(ddof=1) / math.sqrt(NUM_BATCHES)
    assert error < precision * expected
    assert abs(means.mean() - expected) < 4 * error


def md1_wait_s(rate: float, service_s: float) -> float:
    """Mean wait of M/D/1. Source: the Pollaczek-Khinchine formula for a constant service time."""
    load = rate * service_s
    return load * service_s / (2 * (1 - load))


def mdc_chain(rate: float, service_s: float, num_servers: int) -> np.ndarray:
    """
    How likely there are 0, 1, 2... requests in M/D/c.

    One service time later, all that are now in service have left, and nobody who was not: N becomes
    max(N - c, 0) plus a Poisson number of arrivals. Source: C. D. Crommelin, Delay probability formulas when the
    holding times are constant, P.O. Electr. Engr. J. 25 (1932). Solved numerically, cut off far out in the tail.
    """
    mean = rate * service_s
    size = 20 * num_servers + 150
    arrivals = np.exp([k * math.log(mean) - mean - math.lgamma(k + 1) for k in range(size)])
    chain = np.zeros((size, size))
    for number in range(size):
        left = max(number - num_servers, 0)
        chain[number, left:] = arrivals[: size - left]
        chain[number, -1] += 1 - chain[number].sum()
    balance = np.vstack([chain.T - np.eye(size), np.ones(size)])
    return np.linalg.lstsq(balance, np.append(np.zeros(size), 1.0), rcond=None)[0]


def test_the_chain_with_one_server_gives_the_formula_of_one_server():
    for load in (0.3, 0.6, 0.9):
        in_queue = np.maximum(np.arange(170) - 1, 0) @ mdc_chain(load, 1.0, 1)
        assert in_queue / load == pytest.approx(md1_wait_s(load, 1.0), rel=1e-6)


@pytest.mark.parametrize(("load", "num_requests"), [(0.3, 12_000), (0.6, 15_000), (0.85, 45_000)])
def test_one_request_at_a_time_waits_as_in_an_m_d_1_queue(load, num_requests):
    rate = load / SERVICE_S
    watched = watch(SimulationSettings(aggregated(1, ONE_AT_A_TIME), one_token_each(num_requests, rate)))
    waits_s = [wait_s(job) for job in watched.jobs]
    check_mean(waits_s, md1_wait_s(rate, SERVICE_S), 0.05)
    ttft_ms = watched.results.metrics["time_to_first_token"]["avg"]
    assert ttft_ms == pytest.approx((np.mean(waits_s) + SERVICE_S) * 1e3, abs=1e-6)  # whole nanoseconds
    assert watched.results.usage.avg_num_running == pytest.approx(load, rel=0.03)
    assert np.mean(np.array(waits_s) < 1e-9) == pytest.approx(1 - load, abs=0.02)  # Poisson arrivals see time averages


@pytest.mark.parametrize(
    ("num_servers", "load", "num_requests"), [(2, 0.8, 15_000), (4, 0.7, 15_000), (8, 0.85, 20_000)]
)
def test_behind_one_limit_all_workers_together_are_an_m_d_c_queue(num_servers, load, num_requests):
    """As many requests under way as there are workers, each for the least loaded: that is, for one that is idle."""
    rate = num_servers * load / SERVICE_S
    deployment = aggregated(num_servers, ONE_AT_A_TIME, router=RouterSettings("least-loaded"))
    workload = one_token_each(num_requests, rate, concurrency=num_servers)
    watched = watch(SimulationSettings(deployment, workload))
    waits_s = [wait_s(job) for job in watched.jobs]
    probabilities = mdc_chain(rate, SERVICE_S, num_servers)
    numbers = np.arange(len(probabilities))
    check_mean(waits_s, np.maximum(numbers - num_servers, 0) @ probabilities / rate, 0.1)
    has_waited = [float(each > 1e-9) for each in waits_s]
    check_mean(has_waited, probabilities[num_servers:].sum(), 0.04)


def test_at_random_each_worker_is_an_m_d_1_queue_of_its_share():
    """A Poisson stream that is split at random is as many Poisson streams."""
    rate = 4 * 0.7 / SERVICE_S
    deployment = aggregated(4, ONE_AT_A_TIME, router=RouterSettings("random"))
    watched = watch(SimulationSettings(deployment, one_token_each(20_000, rate)))
    check_mean([wait_s(job) for job in watched.jobs], md1_wait_s(rate / 4, SERVICE_S), 0.05)


def test_requests_of_many_lengths_wait_as_in_an_m_g_1_queue():
    """Pollaczek-Khinchine: rate * E[S^2] / (2 (1 - load)); lengths are normal, rounded up."""
    isls, normal = range(1, 1025), NormalDist(ISL, 128)
    shares = np.array([normal.cdf(isl) - normal.cdf(isl - 1) for isl in isls])
    services_s = np.array([prefill_s(isl) for isl in isls])
    load = 0.7
    rate = load / (shares @ services_s)
    workload = replace(one_token_each(30_000, rate), isl_stddev=128.0)
    watched = watch(SimulationSettings(aggregated(1, ONE_AT_A_TIME), workload))
    waits_s = [job.first_token_s - job.sent_s - prefill_s(job.isl_tokens) for job in watched.jobs]
    check_mean(waits_s, rate * (shares @ services_s**2) / (2 * (1 - load)), 0.05)


def test_the_more_a_router_knows_the_less_requests_wait():
    """
    One queue before all workers is best, then the least loaded of all, of two, and any at random.

    Taking turns is as good as one queue where each service takes the same: workers are free again in the order in
    which they began.
    """
    rate = 8 * 0.9 / SERVICE_S
    waits_s = {}
    for mode, concurrency in (("one queue", 8), *((mode, None) for mode in ROUTER_MODES if mode != "kv")):
        router = RouterSettings("least-loaded" if concurrency else mode)
        workload = one_token_each(8000, rate, concurrency=concurrency)
        watched = watch(SimulationSettings(aggregated(8, ONE_AT_A_TIME, router=router), workload))
        waits_s[mode] = np.array([wait_s(job) for job in watched.jobs])
    assert waits_s["round-robin"] == pytest.approx(waits_s["one queue"], abs=1e-9)
    mean_s = {mode: each.mean() for mode, each in waits_s.items()}
    assert mean_s["one queue"] < mean_s["least-loaded"] < mean_s["power-of-two"] < mean_s["random"] / 2


gaps_s = st.lists(st.floats(0, 3 * SERVICE_S), min_size=1, max_size=40)


@given(gaps_s=gaps_s)
@settings(max_examples=60)
def test_each_single_wait_follows_from_the_one_before(gaps_s):
    """
    Whoever comes `gap_s` later waits as long as the one before him, and his service, less the gap.

    Source: D. V. Lindley, The theory of queues with a single server, Proc. Camb. Phil. Soc. 48 (1952).
    """
    arrivals_s = np.cumsum([0.0, *gaps_s]).tolist()
    watched = send(aggregated(1, ONE_AT_A_TIME), (single(ISL, 1, at_s) for at_s in arrivals_s))
    expected_s = 0.0
    for job, gap_s in zip(watched.jobs, [*gaps_s, 0.0], strict=True):
        assert wait_s(job) == pytest.approx(expected_s, abs=1e-9)
        expected_s = max(0.0, expected_s + SERVICE_S - gap_s)


@given(gaps_s=gaps_s, num_servers=st.integers(1, 4))
@settings(max_examples=60)
def test_each_single_wait_before_several_workers_follows_from_when_they_are_free(gaps_s, num_servers):
    """
    First come, first served, by the worker that is free first.

    Source: J. Kiefer, J. Wolfowitz, On the theory of queues with many servers, Trans. Amer. Math. Soc. 78 (1955).
    """
    arrivals_s = np.cumsum([0.0, *gaps_s]).tolist()
    deployment = aggregated(num_servers, ONE_AT_A_TIME, router=RouterSettings("least-loaded"))
    limit = ClientSettings(max_concurrency=num_servers)
    watched = send(deployment, (single(ISL, 1, at_s) for at_s in arrivals_s), limit)
    free_s = [0.0] * num_servers
    for job, arrival_s in zip(watched.jobs, arrivals_s, strict=True):
        start_s = max(arrival_s, min(free_s))
        assert wait_s(job) == pytest.approx(start_s - arrival_s, abs=1e-9)
        free_s[free_s.index(min(free_s))] = start_s + SERVICE_S


@given(gaps_s=gaps_s, transfer_share=st.sampled_from([0.1, 0.9, 1.5, 3.0]))
@settings(max_examples=60)
def test_prefill_link_and_decode_in_a_row_make_requests_wait_only_as_long_as_the_slowest(gaps_s, transfer_share):
    """
    Servers in series, each of a constant time: all waits together are those before the slowest, were it alone.

    Source: H. D. Friedman, Reduction methods for tandem queuing systems, Operations Research 13 (1965).
    """
    transfer_s = transfer_share * SERVICE_S
    deployment = disaggregated(
        prefill=ONE_AT_A_TIME,
        decode=replace(ONE_AT_A_TIME, max_num_seqs=2),  # whoever runs does not keep the next one's KV cache from coming
        kv_transfer_bandwidth=transfer_bandwidth(transfer_s, ISL),
    )
    arrivals_s = np.cumsum([0.0, *gaps_s]).tolist()
    watched = send(deployment, (single(ISL, 1, at_s) for at_s in arrivals_s))
    times_s = (SERVICE_S, transfer_s, decode_s(ISL))
    expected_s = 0.0
    for job, gap_s in zip(watched.jobs, [*gaps_s, 0.0], strict=True):
        assert job.first_token_s - job.sent_s - sum(times_s) == pytest.approx(expected_s, abs=1e-9)
        expected_s = max(0.0, expected_s + max(times_s) - gap_s)


@pytest.mark.parametrize("num_clients", [2, 5, 20])
def test_clients_that_pause_obey_the_interactive_response_time_law(num_clients):
    """
    Clients = throughput * (latency + pause), and one server gives no more than one answer a service time.

    Source: E. D. Lazowska et al., Quantitative System Performance (1984), chapters 3 and 5.
    """
    num_requests, pause_s = 5000, 4 * SERVICE_S
    workload = Workload(isl=ISL, osl=1, concurrency=num_clients, request_count=num_requests)
    watched = watch(SimulationSettings(aggregated(1, ONE_AT_A_TIME), workload, client_turnaround_s=pause_s))
    throughput = num_requests / watched.results.simulated_s
    latency_s = np.mean([watched.latency_s(job) for job in watched.jobs])
    assert throughput * (latency_s + pause_s) == pytest.approx(num_clients, rel=0.03)
    assert throughput <= min(num_clients / (SERVICE_S + pause_s) * 1.03, 1 / SERVICE_S * (1 + 1e-9))
    if num_clients == 20:  # far beyond the five that would do: never idle
        assert throughput == pytest.approx(1 / SERVICE_S, rel=1e-3)
