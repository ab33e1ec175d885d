"""What SGLang's and TensorRT-LLM's schedulers do that vLLM's does not, and what SGLang was measured to do."""

from __future__ import annotations

import pytest

from mock_engine.deployment import DeploymentSettings, WorkerGroup
from mock_engine.engine_settings import EngineSettings, build_engine
from mock_engine.errors import ConfigError
from mock_engine.kv_blocks import KvBlocks
from mock_engine.request import Request
from mock_engine.scheduler_config import SchedulerConfig
from mock_engine.sequence import SequenceState
from mock_engine.sglang_scheduler import INIT_NEW_TOKEN_RATIO, MIN_NEW_TOKEN_RATIO, SglangScheduler
from mock_engine.simulation import SimulationSettings, simulate
from mock_engine.trtllm_scheduler import TrtllmScheduler
from mock_engine.vllm_scheduler import VllmScheduler
from mock_engine.workload import Workload

BLOCK_SIZE = 16


def make(kind, num_blocks=1000, max_num_batched_tokens=64, max_num_seqs=8):
    config = SchedulerConfig(max_num_seqs, max_num_batched_tokens, num_blocks * BLOCK_SIZE)
    return kind(config, KvBlocks(num_blocks, BLOCK_SIZE))


def queue(scheduler, *lengths):
    sequences = [SequenceState(Request(f"r{number}", *both)) for number, both in enumerate(lengths)]
    for sequence in sequences:
        scheduler.add(sequence)
    return sequences


def step(scheduler):
    """One step: the tokens it prefilled for each sequence, and how many got a token by decoding."""
    schedule = scheduler.schedule()
    num_decoding = len(scheduler.decoding) if schedule.has_decodes else 0
    prefilled = {prefill.sequence.request.request_id: prefill.num_new for prefill in schedule.prefills}
    scheduler.complete(schedule)
    return prefilled, num_decoding


def run_to_the_end(scheduler):
    """All steps until nothing is left; the most sequences that ran at once."""
    most = 0
    while scheduler.num_running or scheduler.waiting:
        step(scheduler)
        most = max(most, scheduler.num_running)
    return most


def test_in_sglang_those_that_decode_wait_until_all_prompts_are_computed():
    scheduler = make(SglangScheduler)
    queue(scheduler, (10, 5))
    assert [step(scheduler), step(scheduler)] == [({"r0": 10}, 0), ({}, 1)]
    queue(scheduler, (100, 3), (20, 3))
    steps = [step(scheduler) for _ in range(4)]
    assert steps == [({"r0": 64}, 0), ({"r0": 36, "r1": 20}, 0), ({}, 3), ({}, 3)]


def test_in_vllm_and_tensorrt_llm_they_go_on():
    for kind in (VllmScheduler, TrtllmScheduler):
        scheduler = make(kind)
        queue(scheduler, (10, 5))
        step(scheduler)
        queue(scheduler, (100, 3))
        assert [step(scheduler), step(scheduler)] == [({"r0": 63}, 1), ({"r0": 37}, 1)]


def test_tensorrt_llm_admits_who_can_finish_and_preempts_nobody():
    """Ten sequences of 32 + 96 tokens in a cache that holds three of them whole, and all prompts that may run."""
    most, preemptions = {}, {}
    for kind in (VllmScheduler, TrtllmScheduler):
        scheduler = make(kind, num_blocks=24)
        queue(scheduler, *[(32, 96)] * 10)
        most[kind] = run_to_the_end(scheduler)
        preemptions[kind] = scheduler.num_preemptions
    assert (most[TrtllmScheduler], most[VllmScheduler]) == (3, 8)
    assert preemptions[TrtllmScheduler] == 0 < preemptions[VllmScheduler]


def test_sglang_retracts_the_fewest_output_tokens_then_the_longest_prompt_and_queues_it_last():
    scheduler = make(SglangScheduler, num_blocks=25, max_num_batched_tokens=320)
    queue(scheduler, (48, 200))
    step(scheduler)
    scheduler._ratio_since = -1000  # so much experience that it admits who will not fit later
    short, long = queue(scheduler, (16, 100), (80, 100))
    step(scheduler)
    [waiting] = queue(scheduler, (150, 200))
    while not scheduler.num_preemptions:
        step(scheduler)
    assert scheduler.preempted == [long]
    assert list(scheduler.waiting) == [waiting, long]
    made_tokens = sum(sequence.num_output_tokens - 1 for sequence in scheduler.decoding)
    assert scheduler.new_token_ratio == pytest.approx((made_tokens + 2 * 20) / (200 + 100 + 1))
    assert short in scheduler.decoding


def test_of_sequences_that_are_equally_far_sglang_retracts_the_newest():
    scheduler = make(SglangScheduler, num_blocks=8)
    old, new = queue(scheduler, (16, 40), (16, 40))
    step(scheduler)
    scheduler.blocks.take(scheduler.blocks.num_available - 1)  # both need one
    step(scheduler)
    assert (list(scheduler.decoding), scheduler.preempted) == ([old], [new])


def test_what_sglang_holds_back_sinks_step_by_step_and_begins_anew_once_nothing_runs():
    scheduler = make(SglangScheduler)
    queue(scheduler, (10, 1000))
    step(scheduler)
    assert scheduler.new_token_ratio == INIT_NEW_TOKEN_RATIO
    for _ in range(300):
        step(scheduler)
    assert scheduler.new_token_ratio == pytest.approx((INIT_NEW_TOKEN_RATIO + MIN_NEW_TOKEN_RATIO) / 2)
    run_to_the_end(scheduler)
    assert scheduler.new_token_ratio == MIN_NEW_TOKEN_RATIO
    queue(scheduler, (10, 2))
    step(scheduler)
    assert scheduler.new_token_ratio == INIT_NEW_TOKEN_RATIO


@pytest.mark.parametrize(("num_blocks", "num_running"), [(705, 2), (704, 1)])
def test_of_a_long_answer_sglang_counts_4096_tokens(num_blocks, num_running):
    """Blocks for 16 + 4,096 tokens of the second; of the first, one, and for 0.7 * 4,096 more, held back."""
    scheduler = make(SglangScheduler, num_blocks=num_blocks)
    needed = 257 + 1 + 180
    assert (num_blocks, num_running) in ((needed + 267, 2), (needed + 266, 1))
    scheduler.blocks.take(267)
    queue(scheduler, (16, 10_000))
    step(scheduler)
    queue(scheduler, (16, 10_000))
    step(scheduler)
    assert scheduler.num_running == num_running


@pytest.mark.parametrize(
    ("profile", "engine_type", "kind"),
    [
        ("h100-sxm/qwen3-32b/sglang-tp2-bf16", None, SglangScheduler),
        ("h100-sxm/qwen3-32b/trtllm-tp2-bf16", None, TrtllmScheduler),
        ("h100-sxm/qwen3-32b/vllm-tp2-bf16", None, VllmScheduler),
        ("a100-sxm/llama-2-70b/splitwise-tp8-fp16", None, VllmScheduler),
        ("h100-sxm/qwen3-32b/vllm-tp2-bf16", "sglang", SglangScheduler),
        ("h100-sxm/qwen3-32b/sglang-tp2-bf16", "vllm", VllmScheduler),
    ],
)
def test_an_engine_has_the_scheduler_of_its_profile_s_engine_unless_another_is_asked_for(profile, engine_type, kind):
    engine = build_engine(EngineSettings(profile=profile, engine_type=engine_type))
    assert type(engine.core.scheduler) is kind


def test_an_engine_type_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match="--engine-type is 'llamacpp'; allowed is vllm, sglang, trtllm"):
        EngineSettings(engine_type="llamacpp")


# Qwen3-32B (bf16) on H100s, SGLang 0.5.1, from the silicon sample of NVIDIA's aiconfigurator (Apache-2.0): GPUs, ISL,
# OSL, concurrency, mean TTFT and TPOT in ms.
MEASURED = [
    (2, 1024, 128, 64, 2530.1, 30.1),
    (2, 1024, 256, 128, 4147.3, 38.1),
    (2, 4096, 256, 16, 2607.8, 23.6),
    (4, 1024, 128, 128, 2485.4, 29.7),
    (4, 2048, 256, 64, 2316.6, 22.4),
    (4, 4096, 128, 64, 4684.4, 53.2),
]


@pytest.mark.parametrize(("tp", "isl", "osl", "concurrency", "ttft_ms", "tpot_ms"), MEASURED)
def test_latencies_under_load_are_those_that_sglang_was_measured_to_have(tp, isl, osl, concurrency, ttft_ms, tpot_ms):
    """TTFT within a quarter and TPOT within a tenth; vLLM's policy on the same step times misses by far more."""
    metrics = {}
    for engine_type in ("sglang", "vllm"):
        engine = EngineSettings(profile=f"h100-sxm/qwen3-32b/sglang-tp{tp}-bf16", engine_type=engine_type, jitter=0.0)
        workload = Workload(isl=isl, osl=osl, request_count=5 * concurrency, concurrency=concurrency)
        deployment = DeploymentSettings((WorkerGroup(engine),))
        metrics[engine_type] = simulate(SimulationSettings(deployment, workload, client_turnaround_s=0.01)).metrics
    ttft = metrics["sglang"]["time_to_first_token"]["avg"]
    assert ttft == pytest.approx(ttft_ms, rel=0.25)
    assert metrics["sglang"]["inter_token_latency"]["avg"] == pytest.approx(tpot_ms, rel=0.1)
    assert metrics["vllm"]["time_to_first_token"]["avg"] < 0.65 * ttft_ms
