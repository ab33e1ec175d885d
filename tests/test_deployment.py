"""Several engines as one service: how long each part of a request takes, and what becomes of it where one is lost."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mock_engine.deployment import DeploymentSettings, WorkerGroup
from mock_engine.errors import ConfigError
from mock_engine.profile import load_profile, to_document
from mock_engine.profile_writing import write_folder
from mock_engine.simulation import SimulationSettings
from mock_engine.workload import Workload
from tests.helpers.deployments import (
    BLOCK_SIZE,
    MAX_MODEL_LEN,
    aggregated,
    check_that_nothing_is_left,
    conversation,
    decode_s,
    disaggregated,
    prefill_s,
    send,
    single,
    small_engine,
    transfer_bandwidth,
    watch,
)

ISL = 20
SLOW_S = 1.0  # a transfer that takes longer than all steps
SLOW = transfer_bandwidth(SLOW_S, ISL)

lengths = st.tuples(st.integers(2, 48), st.integers(1, 48))


def token_times_s(isl_tokens: int, osl_tokens: int, start_s: float = 0.0) -> list[float]:
    """When each token of a request comes out of a worker that has nothing else to do."""
    steps_s = [prefill_s(isl_tokens), *(decode_s(isl_tokens + number) for number in range(1, osl_tokens))]
    return [start_s + each for each in accumulate(steps_s)]


def ttfts_s(watched) -> list[float]:
    return [job.first_token_s - job.sent_s for job in watched.jobs]


def close_to(times_s):
    return pytest.approx(times_s, abs=1e-9)


@given(lengths=lengths)
@settings(max_examples=30)
def test_a_request_alone_takes_a_prefill_step_and_a_decode_step_for_each_further_token(lengths):
    [job] = send(aggregated(), [single(*lengths)]).jobs
    expected_s = token_times_s(*lengths)
    assert (job.first_token_s, job.last_token_s) == close_to((expected_s[0], expected_s[-1]))
    assert job.second_token_s == (close_to(expected_s[1]) if lengths[1] > 1 else None)


def test_a_request_spends_the_profile_s_overhead_before_it_is_queued_unless_a_real_frontend_does(tmp_path):
    """HTTP and tokenizing: 5 ms, and 2 us for each token of the prompt. Who gives up meanwhile is never queued."""
    profile = load_profile(small_engine().profile)
    document = to_document(profile)
    document["timing"] |= {"overhead_request_s": 5e-3, "overhead_per_prompt_token_s": 2e-6}
    write_folder(tmp_path / "slow", document, profile.latency)
    engine = small_engine(profile=str(tmp_path / "slow"))
    (usual_s,) = ttfts_s(send(aggregated(), [single(ISL, 2)]))
    assert ttfts_s(send(aggregated(engine=engine), [single(ISL, 2)])) == close_to([usual_s + 5e-3 + ISL * 2e-6])
    assert ttfts_s(send(aggregated(engine=engine, has_ingress=False), [single(ISL, 2)])) == close_to([usual_s])
    gone = send(aggregated(engine=engine), [single(ISL, 2)], probes={4e-3: lambda each: each.cancel(each.jobs[0])})
    check_that_nothing_is_left(gone)
    assert gone.jobs[0].is_cancelled
    assert not gone.deployment.sent


@given(lengths=lengths, gb_per_s=st.floats(0.01, 500))
@settings(max_examples=30)
def test_disaggregated_a_request_alone_also_takes_the_transfer_of_its_prompt(lengths, gb_per_s):
    """TTFT: prefill step, ISL * bytes of a token / bandwidth, and a decode step, for the last prompt token again."""
    isl_tokens, osl_tokens = lengths
    watched = send(disaggregated(kv_transfer_bandwidth=gb_per_s), [single(*lengths)])
    [job] = watched.jobs
    steps_s = [decode_s(isl_tokens + number) for number in range(osl_tokens)]
    transfer_s = isl_tokens * 131_072 / (gb_per_s * 1e9)  # Llama 3.1 8B: 32 layers, 8 KV heads of 128, K and V, 2 bytes
    expected_s = list(accumulate([prefill_s(isl_tokens) + transfer_s + steps_s[0], *steps_s[1:]]))
    assert (job.first_token_s, job.last_token_s) == close_to((expected_s[0], expected_s[-1]))
    assert job.second_token_s == (close_to(expected_s[1]) if osl_tokens > 1 else None)
    assert [each.role for each in watched.deployment.sent] == ["prefill", "decode"]


def test_an_fp8_kv_cache_is_sent_in_half_the_bytes():
    profile = "h100-sxm/llama-3.3-70b/trtllm-tp4-fp8"
    engine = small_engine(profile=profile)
    [job] = send(disaggregated(prefill=engine, decode=engine, kv_transfer_bandwidth=0.01), [single(ISL, 1)]).jobs
    transfer_s = ISL * 163_840 / 0.01e9  # 80 layers, 8 KV heads of 128, K and V, 1 byte
    assert job.first_token_s == close_to(prefill_s(ISL, profile=profile) + transfer_s + decode_s(ISL, profile=profile))


@pytest.mark.parametrize(
    ("num_prefill", "num_decode", "num_requests"),
    [(1, 1, 5), (1, 3, 3), (3, 1, 3)],
    ids=["one link", "one sends to three", "three send to one"],
)
def test_transfers_over_one_link_take_turns_at_full_bandwidth(num_prefill, num_decode, num_requests):
    """The last of n has to wait n times as long: it is all the same whose link is the narrow one."""
    engine = small_engine(num_gpu_blocks_override=100, max_num_batched_tokens=500)
    deployment = disaggregated(num_prefill, num_decode, engine, kv_transfer_bandwidth=SLOW)
    watched = send(deployment, [single(ISL, 1)] * num_requests)
    together_s = prefill_s(*[ISL] * (num_requests // num_prefill))
    assert ttfts_s(watched) == close_to(
        [together_s + number * SLOW_S + decode_s(ISL) for number in range(1, num_requests + 1)]
    )
    check_that_nothing_is_left(watched)


def test_transfers_over_different_links_do_not_wait_for_each_other():
    watched = send(disaggregated(2, 2, kv_transfer_bandwidth=SLOW), [single(ISL, 1)] * 2)
    assert ttfts_s(watched) == close_to([prefill_s(ISL) + SLOW_S + decode_s(ISL)] * 2)


def test_a_prefill_worker_keeps_the_blocks_of_a_prompt_until_they_are_with_the_decode_worker():
    """It has room for one such prompt: the second waits for the transfer of the first."""
    isl_tokens, num_blocks = 60, 15
    engine = small_engine(num_gpu_blocks_override=24, max_num_batched_tokens=isl_tokens)
    deployment = disaggregated(prefill=engine, kv_transfer_bandwidth=transfer_bandwidth(SLOW_S, isl_tokens))
    seen = []

    def look(deployment):
        scheduler = deployment.ranks[0].engine.core.scheduler
        seen.append((scheduler.num_kept_blocks, scheduler.blocks.num_used))

    begin_s = prefill_s(isl_tokens)
    second_s = begin_s + SLOW_S + prefill_s(isl_tokens)
    moments_s = [begin_s + 1e-6, begin_s + SLOW_S - 1e-6, begin_s + SLOW_S + 1e-6, second_s + 1e-6, second_s + 1.1]
    watched = send(deployment, [single(isl_tokens, 1)] * 2, probes=dict.fromkeys(moments_s, look))
    kept = (num_blocks, num_blocks)
    assert seen == [kept, kept, (0, num_blocks), kept, (0, 0)]  # in the middle: used by the second's prefill
    assert ttfts_s(watched) == close_to([time_s + SLOW_S + decode_s(isl_tokens) for time_s in (begin_s, second_s)])


@pytest.mark.parametrize(("mode", "num_moved"), [("full_prompt", 40), ("destination_missing", 16)])
def test_a_later_turn_moves_what_the_decode_worker_lacks_or_everything(mode, num_moved):
    """
    Turn 1 is 20 + 8 tokens; its last token was never computed on, so 27 are in the decode worker's cache, 24 of them
    in full blocks. Turn 2 has 40, and the prefill worker knows the 20 of the first prompt.
    """
    deployment = disaggregated(kv_transfer_bandwidth=SLOW, kv_transfer_timing_mode=mode)
    [first, second] = send(deployment, [conversation((20, 8, 0.0), (12, 2, 0.0))]).jobs
    assert first.first_token_s == close_to(prefill_s(20) + SLOW_S + decode_s(20))
    assert second.num_cached_tokens == 20
    transfer_s = num_moved * SLOW_S / ISL
    assert second.first_token_s - second.sent_s == close_to(prefill_s(20, past_tokens=20) + transfer_s + decode_s(40))


def test_who_is_preempted_on_a_decode_worker_computes_all_tokens_again_there():
    """Prompts came over the link once; 24 blocks do not hold two requests of 15."""
    chunks = []

    def listen(deployment):
        core = deployment.ranks[1].engine.core
        step_s = core._times.step_s
        core._times.step_s = lambda load: chunks.extend(load.prefill_chunks) or step_s(load)

    deployment = disaggregated(
        prefill=small_engine(max_num_batched_tokens=80), decode=small_engine(num_gpu_blocks_override=24)
    )
    watched = send(deployment, [single(40, 20)] * 2, probes={0.0: listen})
    check_that_nothing_is_left(watched)
    assert [job.num_preemptions for job in watched.jobs] == [0, 1]
    assert all(job.last_token_s is not None for job in watched.jobs)
    [(new_tokens, past_tokens)] = chunks  # else it only decodes
    assert new_tokens == 40 + 8  # the first needs a 13th block for token 49; the second came a step later
    assert past_tokens == 0
    assert len(watched.deployment.sent) == 4


@given(
    isl_tokens=st.integers(1, 30), osl_tokens=st.integers(2, 60), share=st.floats(0.001, 0.999), is_late=st.booleans()
)
@settings(max_examples=60)
def test_a_request_of_a_lost_worker_goes_on_elsewhere_with_the_tokens_it_has(isl_tokens, osl_tokens, share, is_late):
    """
    What it has got is prompt now, and computed again with it, on a worker that is there or as soon as there is one.

    No token is lost or comes twice, whenever it happens.
    """
    planned_s = token_times_s(isl_tokens, osl_tokens)
    lost_s = planned_s[-1] * share
    start_s = lost_s + 0.5 if is_late else 0.0
    engine = small_engine(max_num_batched_tokens=96)  # any prompt in one step
    deployment = aggregated(2, engine, starts_s={1: start_s}, losses_s={0: lost_s}, migration_limit=1)
    watched = send(deployment, [single(isl_tokens, osl_tokens)])
    check_that_nothing_is_left(watched)
    got_s = [time_s for time_s in planned_s if time_s < lost_s]
    rest_s = token_times_s(isl_tokens + len(got_s), osl_tokens - len(got_s), max(start_s, lost_s))
    [job] = watched.jobs
    assert job.num_tokens_before == len(got_s)
    assert [each.worker for each in watched.deployment.sent] == [0, 1]
    assert watched.deployment.ranks[0].num_output_tokens == len(got_s)
    assert watched.deployment.ranks[1].num_output_tokens == osl_tokens - len(got_s)
    all_s = got_s + rest_s
    assert (job.first_token_s, job.second_token_s, job.last_token_s) == close_to((all_s[0], all_s[1], all_s[-1]))


def test_without_migration_the_requests_of_a_lost_worker_fail_and_the_others_do_not():
    watched = send(aggregated(2, losses_s={1: 0.1}), [single(ISL, 40)] * 4)
    check_that_nothing_is_left(watched)
    assert [job.failure for job in watched.jobs] == [None, "its worker was lost"] * 2
    assert [watched.deployment.ended_s[job] for job in watched.jobs[1::2]] == [0.1, 0.1]
    steps_s = [prefill_s(ISL, ISL), *(decode_s(ISL + number, ISL + number) for number in range(1, 40))]
    num_over = sum(time_s < 0.1 for time_s in accumulate(steps_s))
    assert [job.num_tokens_before for job in watched.jobs[1::2]] == [num_over, num_over]
    assert [job.last_token_s for job in watched.jobs[::2]] == close_to([sum(steps_s)] * 2)


@pytest.mark.parametrize(("migration_limit", "is_finished"), [(1, False), (2, True)])
def test_a_request_moves_on_no_more_often_than_it_may(migration_limit, is_finished):
    deployment = aggregated(3, losses_s={0: 0.1, 2: 0.2}, migration_limit=migration_limit)
    [job] = send(deployment, [single(ISL, 60)]).jobs
    assert (job.last_token_s is not None) == is_finished
    assert job.num_tries == migration_limit
    assert (job.failure is None) == is_finished


def test_a_kv_cache_that_was_on_its_way_to_a_lost_worker_is_computed_and_sent_again():
    begin_s = prefill_s(ISL) + SLOW_S
    deployment = disaggregated(1, 2, kv_transfer_bandwidth=SLOW, losses_s={1: 0.5}, migration_limit=1)
    watched = send(deployment, [single(ISL, 2)])
    check_that_nothing_is_left(watched)
    assert ttfts_s(watched) == close_to([begin_s + begin_s + decode_s(ISL)])
    assert [each.worker for each in watched.deployment.sent] == [0, 0, 2]


def test_transfers_from_a_lost_worker_do_not_keep_the_link_of_one_that_is_there():
    """
    Two prompts each of two prefill workers, to one decode worker; the first worker is lost in its first transfer.

    Its second transfer would come between those of the other.
    """
    deployment = disaggregated(2, 1, kv_transfer_bandwidth=SLOW, losses_s={0: 0.5})
    watched = send(deployment, [single(ISL, 1)] * 4)
    check_that_nothing_is_left(watched)
    assert [job.failure is None for job in watched.jobs] == [False, True, False, True]
    together_s = prefill_s(ISL, ISL)
    assert [job.first_token_s for job in watched.jobs[1::2]] == close_to(
        [together_s + number * SLOW_S + decode_s(ISL) for number in (2, 3)]
    )


@pytest.mark.parametrize(
    ("cancelled", "waits"),
    [(0, [None, 2, 3]), (1, [1, None, 2]), (2, [1, 2, None])],
    ids=["while it is sent", "while it waits", "while it waits behind another"],
)
def test_a_request_that_is_cancelled_before_its_turn_on_the_link_takes_none(cancelled, waits):
    """Whose transfer has begun, ends it; his blocks are kept until then. The decode worker never hears of him."""
    engine = small_engine(max_num_batched_tokens=100)
    watched = send(
        disaggregated(1, 1, engine, kv_transfer_bandwidth=SLOW),
        [single(ISL, 1)] * 3,
        probes={0.5: lambda deployment: deployment.cancel(deployment.jobs[cancelled])},
    )
    check_that_nothing_is_left(watched)
    job = watched.jobs[cancelled]
    assert job.is_cancelled
    assert watched.deployment.ended_s[job] == 0.5
    assert [each.role for each in watched.deployment.sent].count("decode") == 2
    together_s = prefill_s(*[ISL] * 3)
    for job, wait in zip(watched.jobs, waits, strict=True):
        if wait is not None:
            assert job.first_token_s == close_to(together_s + wait * SLOW_S + decode_s(ISL))


def test_requests_wait_for_a_worker_to_start_and_then_go_in_their_order():
    deployment = aggregated(2, small_engine(max_num_seqs=1), startup_time=0.5, starts_s={1: 0.7})
    watched = send(deployment, [single(ISL, 1, at_s) for at_s in (0.0, 0.1, 0.2)])
    assert [job.first_token_s for job in watched.jobs] == close_to([0.5 + k * prefill_s(ISL) for k in (1, 2, 3)])
    assert [each.worker for each in watched.deployment.sent] == [0, 0, 0]


@pytest.mark.parametrize("late", [0, 1], ids=["prefill", "decode"])
def test_requests_wait_until_there_is_a_worker_for_each_part_of_them(late):
    """A prompt that nobody could take over is not computed; above all, it does not fail."""
    watched = send(disaggregated(starts_s={late: 0.5}, kv_transfer_bandwidth=SLOW), [single(ISL, 1)])
    assert ttfts_s(watched) == close_to([0.5 + prefill_s(ISL) + SLOW_S + decode_s(ISL)])


def test_a_prompt_whose_decode_workers_are_all_lost_starts_again_when_there_is_one():
    deployment = disaggregated(1, 2, losses_s={1: 0.001}, starts_s={2: 0.5}, migration_limit=1)
    watched = send(deployment, [single(ISL, 1)])
    check_that_nothing_is_left(watched)
    transfer_s = ISL * 131_072 / 64e9
    assert ttfts_s(watched) == close_to([0.5 + prefill_s(ISL) + transfer_s + decode_s(ISL)])


def test_what_waits_at_the_end_for_a_worker_that_never_comes_has_failed():
    watched = send(aggregated(losses_s={0: 0.1}), [single(ISL, 1, 0.2), single(ISL, 1, 0.3)])
    check_that_nothing_is_left(watched)
    assert [job.failure for job in watched.jobs] == ["no worker was up to take it"] * 2
    assert watched.deployment.sent == []


def test_a_request_can_be_cancelled_twice_and_after_its_end():
    deployment_seen = []

    def cancel_all(deployment):
        deployment_seen.append(deployment)
        for job in deployment.jobs:
            deployment.cancel(job)

    sessions = [single(ISL, 1), single(ISL, 90), single(ISL, 60, 0.1)]  # done, too long, and under way
    watched = send(aggregated(), sessions, probes={0.2: cancel_all, 0.21: cancel_all, 5.0: cancel_all})
    check_that_nothing_is_left(watched)
    assert [(job.is_cancelled, job.failure is not None) for job in watched.jobs] == [
        (False, False),
        (False, True),
        (True, False),
    ]
    assert len(deployment_seen) == 3


def test_each_data_parallel_rank_is_an_engine_of_its_own():
    """Two requests at once take as long as one, and a second turn, to an idle worker, goes where the first was."""
    watched = send(aggregated(data_parallel_size=2), [single(ISL, 10)] * 2)
    assert [job.last_token_s for job in watched.jobs] == close_to([token_times_s(ISL, 10)[-1]] * 2)
    assert [rank.worker for rank in watched.deployment.ranks] == [0, 0]
    turns = conversation((20, 8, 0.0), (12, 2, 0.0))
    watched = send(aggregated(data_parallel_size=2), [turns])
    assert watched.jobs[1].num_cached_tokens == 24
    assert [rank.engine.core.scheduler.blocks.num_cached > 0 for rank in watched.deployment.ranks] == [True, False]
    assert send(aggregated(), [turns]).jobs[1].num_cached_tokens == 24
    assert send(aggregated(2), [turns]).jobs[1].num_cached_tokens == 0  # in turns, to the other worker


def test_all_ranks_of_a_lost_worker_are_lost():
    watched = send(aggregated(2, data_parallel_size=2, losses_s={0: 0.1}), [single(ISL, 40)] * 4)
    assert [job.failure is None for job in watched.jobs] == [False, True, False, True]


def test_ranks_have_jitter_of_their_own_that_follows_from_the_seed():
    jittery = small_engine(jitter=0.1, seed=5)
    times_s = [
        [job.last_token_s for job in send(aggregated(2, engine), [single(ISL, 10)] * 2).jobs]
        for engine in (jittery, jittery, small_engine(jitter=0.1, seed=6))
    ]
    assert times_s[0] == times_s[1]
    assert times_s[0][0] != times_s[0][1]
    assert times_s[0][0] != times_s[2][0]


def test_a_request_that_fits_the_prefill_worker_but_not_the_decode_worker_fails_with_the_reason():
    deployment = disaggregated(prefill=small_engine(), decode=small_engine(max_model_len=40))
    watched = send(deployment, [single(30, 11), single(30, 10)])
    check_that_nothing_is_left(watched)
    assert watched.deployment.max_model_len == 40
    assert [job.failure for job in watched.jobs] == ["longer than the context length of 40 tokens", None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_workers": 0}, "--workers is 0; it must be at least 1"),
        ({"role": "prefill"}, "disaggregated serving needs both --prefill-workers and --decode-workers"),
        ({"data_parallel_size": 0}, "--data-parallel-size is 0; it must be at least 1"),
        ({"kv_transfer_bandwidth": 0.0}, "--kv-transfer-bandwidth is 0; it must be above 0, in GB/s"),
        ({"kv_transfer_timing_mode": "fast"}, "--kv-transfer-timing-mode is 'fast'; allowed is full_prompt, dest"),
        ({"startup_time": -1.0}, "--startup-time is -1; it must be 0 or more, in seconds"),
        ({"startup_time": math.inf}, "--startup-time is inf"),
        ({"migration_limit": -1}, "--migration-limit is -1; it must be 0 or more"),
        ({"starts_s": {2: 1.0}}, "--start-worker names worker 2; there are 0 to 1"),
        ({"losses_s": {-1: 1.0}}, "--lose-worker names worker -1; there are 0 to 1"),
        ({"losses_s": {0: -1.0}}, "--lose-worker 0:-1 has no time of 0 s or more"),
        ({"starts_s": {1: 5.0}, "losses_s": {1: 3.0}}, "--lose-worker 1:3 is before that worker starts, at 5 s"),
        ({"startup_time": 5.0, "losses_s": {1: 3.0}}, "--lose-worker 1:3 is before that worker starts, at 5 s"),
    ],
)
def test_a_deployment_that_cannot_be_is_refused(change, message):
    of_group = {name: change[name] for name in change if name in ("num_workers", "role")}
    of_all = {name: change[name] for name in change if name not in of_group}
    with pytest.raises(ConfigError, match=message):
        DeploymentSettings((WorkerGroup(small_engine(), **{"num_workers": 2, **of_group}),), **of_all)


def test_workers_with_kv_blocks_of_different_sizes_are_refused():
    groups = (*aggregated(1).groups, *aggregated(1, small_engine(block_size=2 * BLOCK_SIZE)).groups)
    with pytest.raises(ConfigError, match="KV blocks of 4 and 8 tokens; a router needs one size"):
        send(DeploymentSettings(groups), [single(ISL, 1)])


@pytest.mark.parametrize("engine_type", ["vllm", "sglang", "trtllm"])
@pytest.mark.parametrize("max_num_seqs", [1, 2])
def test_a_full_decode_worker_goes_on_though_blocks_are_promised_to_those_who_come(engine_type, max_num_seqs):
    """Who decodes may have to give way to KV caches on their way, and must not wait for them in vain."""
    num_preemptions = 0
    for seed in range(6):
        engine = small_engine(
            engine_type=engine_type,
            num_gpu_blocks_override=MAX_MODEL_LEN // BLOCK_SIZE + seed,
            max_num_seqs=max_num_seqs,
            enable_prefix_caching=bool(seed % 2),
        )
        workload = Workload(
            isl=20, isl_stddev=14.0, osl=25, osl_stddev=18.0, concurrency=6, request_count=24, random_seed=seed
        )
        watched = watch(SimulationSettings(disaggregated(1, 1, engine, engine), workload))
        check_that_nothing_is_left(watched)
        num_preemptions += sum(job.num_preemptions for job in watched.jobs)
    assert num_preemptions or engine_type != "vllm"  # it did come to that


def test_where_the_decode_worker_is_full_the_transfer_waits_for_blocks():
    """Its links are free all the time; what is missing are blocks, and who decodes has them until he ends."""
    num_blocks = MAX_MODEL_LEN // BLOCK_SIZE
    decode = small_engine(num_gpu_blocks_override=num_blocks)
    kept = []
    watched = send(
        disaggregated(1, 1, small_engine(), decode, kv_transfer_bandwidth=64.0),
        [single(60, 30), single(50, 2)],
        probes={
            time_s: lambda deployment: kept.append(
                (deployment.ranks[0].engine.core.scheduler.num_kept_blocks, deployment.ranks[1].drive.num_waiting)
            )
            for time_s in (0.1, 0.15)
        },
    )
    check_that_nothing_is_left(watched)
    first, second = watched.jobs
    assert kept == [(13, 0), (13, 0)]  # 50 tokens in blocks of 4, and the decode worker has no request of theirs queued
    assert first.last_token_s is not None
    assert second.first_token_s is not None
    assert second.first_token_s > first.last_token_s
