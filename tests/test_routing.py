"""Which worker gets a request: each policy by its definition, the KV router's cost by hand."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mock_engine.deployment import DeploymentSettings, WorkerGroup
from mock_engine.drive_virtual import VirtualClock, VirtualDrive
from mock_engine.errors import ConfigError
from mock_engine.request import Request
from mock_engine.router_settings import RouterSettings
from mock_engine.routing import RoutedLoad, make_router
from mock_engine.simulation import SimulationSettings
from mock_engine.workload import Workload
from tests.helpers.deployments import A100, H100, aggregated, decode_s, prefill_s, send, single, small_engine, watch
from tests.helpers.virtual import Notes
from tests.helpers.workloads import make_core

NUM_DRAWS = 4000
PROMPT = Request("r", isl_tokens=18, osl_tokens=2, block_hashes=(1, 2, 3, 4))  # four full KV blocks of 4, and a half


class Cluster:
    """Workers that a router chooses from, with what is in their caches and what they were sent."""

    def __init__(self, num_workers: int):
        self.clock = VirtualClock()
        self.workers = [
            RoutedLoad(VirtualDrive(self.clock, make_core(max_num_batched_tokens=64), Notes()))
            for _ in range(num_workers)
        ]

    def send(self, worker: int, isl_tokens: int, osl_tokens: int = 1, block_hashes=()):
        request = Request("r", isl_tokens, osl_tokens, block_hashes)
        flight = self.workers[worker].drive.submit(request)
        self.workers[worker].add(flight)
        return flight

    def cache(self, worker: int, block_hashes):
        """Let it serve a prompt of these blocks, long ago."""
        flight = self.send(worker, 4 * len(block_hashes), 1, block_hashes)
        self.clock.run()
        self.workers[worker].remove(flight)

    def choose(self, mode: str, request: Request = PROMPT, seed: int = 0, **router):
        settings = RouterSettings(mode, **router)
        return self.workers.index(make_router(settings, np.random.default_rng(seed))(request, self.workers))

    def shares(self, mode: str, request: Request = PROMPT, **router):
        """How often each worker is chosen by one router that is asked again and again."""
        route = make_router(RouterSettings(mode, **router), np.random.default_rng(0))
        counts = Counter(self.workers.index(route(request, self.workers)) for _ in range(NUM_DRAWS))
        return [counts[index] / NUM_DRAWS for index in range(len(self.workers))]


def close_to(shares):
    """Within 4 standard deviations of the share that was drawn."""
    return [pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / NUM_DRAWS)) for share in shares]


def loaded(*num_active: int) -> Cluster:
    """So many requests each; the more there are, the shorter are their prompts."""
    cluster = Cluster(len(num_active))
    for worker, number in enumerate(num_active):
        for _ in range(number):
            cluster.send(worker, 40 // number**2)
    return cluster


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("round-robin", [1, 2, 1, 2]), ("least-loaded", [2, 2, 2, 2]), ("kv", [2, 2, 2, 2])],
)
def test_a_worker_chooses_among_its_ranks_itself_except_for_the_kv_router(mode, expected):
    """Two workers of two ranks: with 3 and 1 requests, and 0 and 2, one of which takes up 40 tokens."""
    cluster = Cluster(4)
    for rank, isl_tokens in ((0, 4), (0, 4), (0, 4), (1, 40), (3, 4), (3, 4)):
        cluster.send(rank, isl_tokens)
    route = make_router(RouterSettings(mode), np.random.default_rng(0), lambda rank: cluster.workers.index(rank) // 2)
    assert [cluster.workers.index(route(PROMPT, cluster.workers)) for _ in range(4)] == expected


@given(num_workers=st.integers(1, 6), num_requests=st.integers(1, 40))
def test_round_robin_takes_turns_whatever_the_load(num_workers, num_requests):
    cluster = loaded(*range(num_workers))
    route = make_router(RouterSettings("round-robin"), np.random.default_rng(0))
    chosen = [cluster.workers.index(route(PROMPT, cluster.workers)) for _ in range(num_requests)]
    assert chosen == [number % num_workers for number in range(num_requests)]


def test_random_is_uniform_whatever_the_load():
    assert loaded(5, 0, 1, 0).shares("random") == close_to([1 / 4] * 4)


@given(num_active=st.lists(st.integers(0, 4), min_size=1, max_size=6))
@settings(max_examples=50)
def test_least_loaded_takes_one_with_the_fewest_requests(num_active):
    assert num_active[loaded(*num_active).choose("least-loaded")] == min(num_active)


def test_power_of_two_takes_the_less_loaded_of_any_two():
    """Of four, six pairs: the least loaded wins three, the next two, then one; the most loaded none."""
    assert loaded(6, 0, 4, 2).shares("power-of-two") == close_to([0, 3 / 6, 1 / 6, 2 / 6])


def test_power_of_two_serves_where_there_is_only_one():
    assert loaded(3).choose("power-of-two") == 0


@pytest.mark.parametrize("mode", ["round-robin", "least-loaded", "random", "power-of-two", "kv"])
@given(seed=st.integers(0, 1000))
@settings(max_examples=8)
def test_in_a_deployment_each_policy_keeps_its_promise(mode, seed):
    """With cancels, ends and steps between one request and the next."""
    workload = Workload(
        isl=16,
        isl_stddev=12.0,
        osl=12,
        osl_stddev=8.0,
        request_rate=300.0,
        request_count=40,
        request_cancellation_rate=20.0,
        request_cancellation_delay=0.05,
        random_seed=seed,
    )
    watched = watch(SimulationSettings(aggregated(4, small_engine(seed=seed), router=RouterSettings(mode)), workload))
    sent = watched.deployment.sent
    counts = Counter(each.worker for each in sent)
    assert sum(counts.values()) == 40
    if mode == "round-robin":
        assert [each.worker for each in sent] == [number % 4 for number in range(40)]
    elif mode == "least-loaded":
        assert all(each.num_active == min(each.all_active) for each in sent)
    elif mode == "power-of-two":
        assert all(each.num_active <= sorted(each.all_active)[-2] for each in sent)
        assert len(counts) == 4
    else:
        assert len(counts) >= 3


def test_the_kv_router_counts_blocks_to_prefill_less_cached_ones_plus_those_that_decode():
    """
    In blocks of 4 tokens, for a prompt of 18 with four full blocks:

    - worker 0 holds three of them, and its two requests decode with 5 + 5 blocks: 18/4 - 3 + 10 = 11.5
    - worker 1 holds nothing, and has one request of 20 tokens in prefill: (20 + 18)/4 + 5 = 14.5
    - worker 2 holds another prompt's block, and its request decodes with 3 blocks: 18/4 + 3 = 7.5
    """
    cluster = Cluster(3)
    cluster.cache(0, (1, 2, 3, 9))
    cluster.cache(2, (8,))
    for worker, isl_tokens in ((0, 20), (0, 17), (2, 10)):
        cluster.send(worker, isl_tokens, 20)
    cluster.clock.run(0.1)  # they make tokens now
    cluster.send(1, 20, 20)
    assert [worker.num_overlap_blocks(PROMPT) for worker in cluster.workers] == [3, 0, 0]
    assert [worker.active_prefill_tokens for worker in cluster.workers] == [0, 20, 0]
    assert [worker.active_blocks for worker in cluster.workers] == [10, 5, 3]
    assert [worker.num_new_blocks(PROMPT) for worker in cluster.workers] == [5, 5, 5]  # to be added to each
    costs = np.array([11.5, 14.5, 7.5])
    assert cluster.choose("kv") == 2
    weights = np.exp(-(costs - 7.5) / 7.0 / 0.8)  # the costs over a range of 1
    assert cluster.shares("kv", router_temperature=0.8) == close_to(weights / weights.sum())


@given(prompts=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 8), st.booleans()), max_size=12), data=st.data())
def test_a_block_that_several_prompts_share_counts_once(prompts, data):
    """Each prompt has some blocks of its own after some that all begin with; one prefilled elsewhere shares none."""
    cluster = Cluster(1)
    [worker] = cluster.workers
    flights = []

    def blocks_of(number, isl_tokens, num_shared):
        return [i if i < num_shared else 1000 * number + i for i in range(1, isl_tokens // 4 + 1)]

    def check():
        full, others = set(), 0
        for flight in flights:
            request = flight.sequence.request
            shared = [] if request.num_remote_tokens else request.block_hashes
            full.update(shared)
            others += -(-request.isl_tokens // 4) - len(shared)
        assert worker.active_blocks == len(full) + others
        for num_shared in range(9):
            request = Request("new", 34, 2, blocks_of(99, 34, num_shared))
            assert worker.num_new_blocks(request) == 9 - len(full.intersection(request.block_hashes))

    for number, (isl_tokens, num_shared, is_remote) in enumerate(prompts, start=1):
        hashes = blocks_of(number, isl_tokens, num_shared)
        request = Request("r", isl_tokens, 2, hashes, num_remote_tokens=(isl_tokens - 1) * is_remote)
        flights.append(worker.drive.submit(request))
        worker.add(flights[-1])
        check()
    while flights:
        worker.remove(flights.pop(data.draw(st.integers(0, len(flights) - 1))))
        check()
    assert not worker._num_sharing


@pytest.mark.parametrize(
    ("num_decoding", "router", "chosen"),
    [
        # Worker 0 holds four blocks of the prompt: without any load that is worth as many decoding ones.
        (0, {}, 0),
        (3, {}, 0),
        (4, {}, 1),  # costs are equal, and the second has fewer requests
        (5, {}, 1),
        # Half the credit: two blocks.
        (1, {"router_kv_overlap_score_credit": 0.5}, 0),
        (3, {"router_kv_overlap_score_credit": 0.5}, 1),
        # No credit at all: any load decides.
        (1, {"router_kv_overlap_score_credit": 0.0}, 1),
        # Prefill counts twice: eight blocks.
        (7, {"router_prefill_load_scale": 2.0}, 0),
        (9, {"router_prefill_load_scale": 2.0}, 1),
        # Prefill does not count: any load decides again.
        (1, {"router_prefill_load_scale": 0.0}, 1),
    ],
)
def test_the_kv_router_trades_cached_blocks_against_decoding_ones(num_decoding, router, chosen):
    cluster = Cluster(2)
    cluster.cache(0, PROMPT.block_hashes)
    for _ in range(num_decoding):
        cluster.send(0, 4, 20)  # a block each
    cluster.clock.run(cluster.clock.now + 0.09)
    assert cluster.workers[0].active_prefill_tokens == (4 if num_decoding > 8 else 0)  # eight run at most
    assert cluster.choose("kv", **router) == chosen


def test_the_kv_router_finds_no_more_of_a_prompt_than_its_full_blocks():
    """Hashes also cover the answer: of 18 + 2 tokens five blocks, of which the prompt fills four."""
    cluster = Cluster(1)
    cluster.cache(0, (1, 2, 3, 4, 5))
    assert cluster.workers[0].num_overlap_blocks(Request("r", 18, 2, (1, 2, 3, 4, 5))) == 4
    assert cluster.workers[0].num_overlap_blocks(Request("r", 18, 2)) == 0


def test_prompt_tokens_count_until_the_first_token_or_the_end():
    """A request that is cancelled behind another one is forgotten at once, not when the other gets its first token."""
    cluster = Cluster(1)
    [worker] = cluster.workers
    first, second = cluster.send(0, 40, 4), cluster.send(0, 40, 4)
    assert worker.active_prefill_tokens == 80
    worker.drive.cancel(second)
    worker.remove(second)
    assert worker.active_prefill_tokens == 40
    cluster.clock.run(0.01)
    assert first.first_token_s is not None
    assert worker.active_prefill_tokens == 0
    assert (worker.num_active, worker.active_blocks) == (1, 10)


def test_prompt_tokens_found_in_the_cache_or_prefilled_elsewhere_are_no_prefill_to_wait_for():
    cluster = Cluster(2)
    cluster.cache(0, (1, 2, 3))
    cluster.send(0, 18, 2, (1, 2, 3, 4))
    assert cluster.workers[0].active_prefill_tokens == 18 - 3 * 4
    remote = Request("remote", 18, 2, (1, 2, 3, 4), num_remote_tokens=17)
    cluster.workers[1].add(cluster.workers[1].drive.submit(remote))
    assert cluster.workers[1].active_prefill_tokens == 0
    # For another such request only what decodes counts: both have five blocks, so the tie goes by number.
    assert cluster.choose("kv", remote) == 0
    cluster.send(0, 4)
    assert cluster.choose("kv", remote) == 1


def test_without_a_temperature_the_kv_router_always_decides_alike():
    cluster = loaded(1, 3, 2)
    assert {cluster.choose("kv", seed=seed) for seed in range(50)} == {1}


def test_the_higher_the_temperature_the_more_the_kv_router_spreads():
    """From always the cheapest to all alike."""
    cluster = loaded(1, 3, 2)
    assert cluster.shares("kv", router_temperature=1e-3) == [0, 1, 0]
    assert cluster.shares("kv", router_temperature=1e6) == close_to([1 / 3] * 3)
    lowest = [cluster.shares("kv", router_temperature=10.0**power)[1] for power in range(-2, 3)]
    assert lowest == sorted(lowest, reverse=True)


def test_costs_that_are_all_equal_are_drawn_alike():
    assert Cluster(4).shares("kv", router_temperature=0.5) == close_to([1 / 4] * 4)


def test_turns_of_a_conversation_go_where_their_kv_blocks_are():
    """Conversations one after the other, so that nothing but the cache makes a difference."""
    workload = Workload(isl=16, osl=4, conversation_num=8, conversation_turn_mean=4, concurrency=1)
    engine = small_engine(num_gpu_blocks_override=4000)
    hits = {}
    for mode in ("kv", "round-robin"):
        watched = watch(SimulationSettings(aggregated(4, engine, router=RouterSettings(mode)), workload))
        hits[mode] = watched.results.prefix_cache_hit_rate
        workers_of = {}
        for job in watched.jobs:
            workers_of.setdefault(job.client.number, set()).add(job.rank.worker)
        assert all(len(workers) == (1 if mode == "kv" else 4) for workers in workers_of.values())
    assert hits["round-robin"] == 0  # the fourth turn comes to the fourth worker
    assert hits["kv"] == pytest.approx((16 + 36 + 56) / (16 + 36 + 56 + 76), abs=0.1)


def test_each_worker_is_as_fast_as_its_own_profile_and_the_faster_one_gets_more():
    slow, fast = (WorkerGroup(small_engine(profile=profile)) for profile in (A100, H100))
    in_turn = DeploymentSettings((slow, fast), router=RouterSettings("round-robin"))
    for job, profile in zip(send(in_turn, [single(40, 2, 0.0), single(40, 2, 1.0)]).jobs, (A100, H100), strict=True):
        assert job.first_token_s - job.sent_s == pytest.approx(prefill_s(40, profile=profile))
        assert job.last_token_s - job.first_token_s == pytest.approx(decode_s(41, profile=profile))
    workload = Workload(isl=4, osl=20, concurrency=12, request_count=400)
    by_load = DeploymentSettings((slow, fast), router=RouterSettings("least-loaded"))
    counts = Counter(each.worker for each in watch(SimulationSettings(by_load, workload)).deployment.sent)
    speed_ratio = decode_s(*[14] * 6, profile=A100) / decode_s(*[14] * 6)
    assert counts[1] / counts[0] == pytest.approx(speed_ratio, rel=0.1)
    assert speed_ratio > 1.3


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"router_mode": "fastest"}, "--router-mode is 'fastest'; allowed is round-robin, random, power-of-two"),
        ({"router_temperature": -1}, "--router-temperature is -1; it must be 0 or more"),
        ({"router_prefill_load_scale": math.inf}, "--router-prefill-load-scale is inf; it must be 0 or more"),
        ({"router_kv_overlap_score_credit": math.nan}, "--router-kv-overlap-score-credit is nan; it must be 0 or more"),
    ],
)
def test_a_router_that_cannot_be_is_refused(router, message):
    with pytest.raises(ConfigError, match=message):
        RouterSettings(**router)
